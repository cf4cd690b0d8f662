//! What is known of snapshots, in SQLite: names, parents, labels. A snapshot is on the disk once its commit has
//! answered. Of what is prepared and removed a loss of power may take the last seconds, as it does of what is
//! written in them: containerd makes new ones, and removes again what it does not know.
//!
//! containerd keeps the other half of this in a database of its own. If this half is lost, every pull of an
//! image that it knew fails for good, so a store that is missing beside its snapshots, damaged, or of a
//! later version is refused instead of being begun anew.

mod open;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::ids::ParseIdsError;
use crate::lazy::{LazyError, LazyLayer};

pub use open::OpenStoreError;

/// The number of a snapshot, and the name of its folder. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SnapshotId(pub(crate) i64);

/// What can be done with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is read.
    View,
    /// It is written.
    Active,
    /// Others are made on it.
    Committed,
}

/// What containerd is told of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Info {
    pub(crate) name: String,
    pub(crate) parent: Option<String>,
    pub(crate) kind: Kind,
    pub(crate) created: SystemTime,
    pub(crate) updated: SystemTime,
    pub(crate) labels: BTreeMap<String, String>,
}

/// What the mounts of a snapshot are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lineage {
    pub(crate) id: SnapshotId,
    pub(crate) kind: Kind,
    pub(crate) below: Below,
}

/// What a snapshot is made on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Below {
    /// The nearest first, to the first lazy one: that has what all below it have.
    pub(crate) parents: Vec<SnapshotId>,
    /// What the last of the parents is, if that is lazy.
    pub(crate) lazy: Option<LazyLayer>,
}

/// What a snapshot takes of the disk, without its parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Usage {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// What is known of what a snapshot takes.
#[derive(Debug)]
pub(crate) struct KnownUsage {
    pub(crate) id: SnapshotId,
    pub(crate) kind: Kind,
    /// If it was measured after its commit.
    pub(crate) usage: Option<Usage>,
    /// If it was not unpacked.
    pub(crate) lazy: Option<LazyLayer>,
}

/// A change of labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Update {
    /// These labels and no others.
    Replace(BTreeMap<String, String>),
    /// Each of these is set; one without a value is deleted.
    Set(BTreeMap<String, String>),
}

/// Something cannot be done with a snapshot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("there is no snapshot {0}")]
    Missing(String),
    #[error("there is a snapshot {0} already")]
    Exists(String),
    #[error("{parent} is no committed snapshot, so none can be made on it")]
    ParentNotCommitted { parent: String },
    #[error("snapshot {key} was prepared on {prepared:?} and cannot be committed on {asked:?}")]
    OtherParent { key: String, prepared: String, asked: String },
    #[error("snapshot {key} is {}, not active", kind.name())]
    NotActive { key: String, kind: Kind },
    #[error("snapshot {key} is committed: only those that are prepared or viewed have mounts")]
    NoMounts { key: String },
    /// containerd's tests look for the word "remove".
    #[error("cannot remove snapshot {0}: others are made on it")]
    HasChildren(String),
    #[error("the folder of a snapshot")]
    Folder(#[source] io::Error),
    #[error("mounting {image}")]
    Mount {
        image: String,
        #[source]
        source: LazyError,
    },
    /// For a call that must not: it is to be made again by somebody who may.
    #[error("an image is to be found or mounted first, which may take long")]
    Waits,
    #[error(transparent)]
    Ids(#[from] ParseIdsError),
    #[error("the metadata store")]
    Database(#[from] rusqlite::Error),
}

impl Kind {
    /// As filters have it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }

    const fn number(self) -> i64 {
        match self {
            Self::View => 1,
            Self::Active => 2,
            Self::Committed => 3,
        }
    }

    const fn of(number: i64) -> Self {
        match number {
            1 => Self::View,
            2 => Self::Active,
            _ => Self::Committed,
        }
    }
}

/// The store of one root folder.
#[derive(Debug)]
pub(crate) struct Store {
    connection: Mutex<Connection>,
}

impl Store {
    /// Notes a new snapshot. `make` makes its folder; if that fails, there is none.
    pub(crate) fn create(
        &self,
        kind: Kind,
        (key, parent): (&str, &str),
        labels: &BTreeMap<String, String>,
        make: impl FnOnce(&Lineage) -> io::Result<()>,
    ) -> Result<Lineage, StoreError> {
        let mut connection = self.connection.lock();
        let work = connection.transaction()?;
        if find(&work, key)?.is_some() {
            return Err(StoreError::Exists(key.to_owned()));
        }
        let parent = committed(&work, parent)?;
        let now = nanos(SystemTime::now());
        work.prepare_cached(
            "INSERT INTO snapshots (name, parent, kind, created, updated, labels) VALUES (?, ?, ?, ?4, ?4, ?)",
        )?
        .execute(params![key, parent.map(|id| id.0), kind.number(), now, encode(labels)])?;
        let id = SnapshotId(work.last_insert_rowid());
        let lineage = Lineage { id, kind, below: below(&work, parent)? };
        make(&lineage).map_err(StoreError::Folder)?;
        work.commit()?;
        Ok(lineage)
    }

    /// Notes a committed snapshot that needs no unpacking. `make` makes its folder.
    pub(crate) fn create_lazy(
        &self,
        (name, parent): (&str, &str),
        labels: &BTreeMap<String, String>,
        lazy: &LazyLayer,
        make: impl FnOnce(SnapshotId) -> io::Result<()>,
    ) -> Result<SnapshotId, StoreError> {
        let mut connection = self.connection.lock();
        let lasting = Lasting::begin(&mut connection)?;
        let work = lasting.0.transaction()?;
        if find(&work, name)?.is_some() {
            return Err(StoreError::Exists(name.to_owned()));
        }
        let parent = committed(&work, parent)?.map(|id| id.0);
        let lazy = serde_json::to_string(lazy).expect("strings and numbers are JSON");
        let now = nanos(SystemTime::now());
        work.prepare_cached(
            "INSERT INTO snapshots (name, parent, kind, created, updated, labels, lazy)
             VALUES (?, ?, ?, ?4, ?4, ?, ?)",
        )?
        .execute(params![
            name,
            parent,
            Kind::Committed.number(),
            now,
            encode(labels),
            lazy
        ])?;
        let id = SnapshotId(work.last_insert_rowid());
        make(id).map_err(StoreError::Folder)?;
        work.commit()?;
        Ok(id)
    }

    /// How many snapshots `name` stands on, itself included; none for no name.
    pub(crate) fn height(&self, name: &str) -> Result<u32, StoreError> {
        let connection = self.connection.lock();
        let mut count = connection.prepare_cached(
            "WITH RECURSIVE line (parent) AS (
                 SELECT parent FROM snapshots WHERE name = ?
                 UNION ALL SELECT next.parent FROM line JOIN snapshots AS next ON next.id = line.parent
             ) SELECT count(*) FROM line",
        )?;
        Ok(count.query_row([name], |row| row.get(0))?)
    }

    /// Makes the active snapshot `key` a committed one called `name`, with these labels. `settle` has its folder
    /// be on the disk.
    pub(crate) fn commit(
        &self,
        key: &str,
        (name, parent): (&str, &str),
        labels: &BTreeMap<String, String>,
        settle: impl FnOnce(SnapshotId) -> io::Result<()>,
    ) -> Result<SnapshotId, StoreError> {
        let mut connection = self.connection.lock();
        let lasting = Lasting::begin(&mut connection)?;
        let work = lasting.0.transaction()?;
        if find(&work, name)?.is_some() {
            return Err(StoreError::Exists(name.to_owned()));
        }
        let record = found(&work, key)?;
        if record.kind != Kind::Active {
            return Err(StoreError::NotActive { key: key.to_owned(), kind: record.kind });
        }
        let prepared = record.parent.unwrap_or_default();
        if !parent.is_empty() && parent != prepared {
            let (key, asked) = (key.to_owned(), parent.to_owned());
            return Err(StoreError::OtherParent { key, prepared, asked });
        }
        settle(record.id).map_err(StoreError::Folder)?;
        let now = nanos(SystemTime::now());
        work.prepare_cached(
            "UPDATE snapshots SET name = ?2, kind = ?3, created = ?4, updated = ?4, labels = ?5 WHERE id = ?1",
        )?
        .execute(params![record.id.0, name, Kind::Committed.number(), now, encode(labels)])?;
        work.commit()?;
        Ok(record.id)
    }

    /// Forgets a snapshot. Returns what it was.
    pub(crate) fn remove(&self, key: &str) -> Result<(SnapshotId, Option<LazyLayer>), StoreError> {
        let mut connection = self.connection.lock();
        let work = connection.transaction()?;
        let Record { id, lazy, .. } = found(&work, key)?;
        let mut children =
            work.prepare_cached("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1")?;
        if children.exists([id.0])? {
            return Err(StoreError::HasChildren(key.to_owned()));
        }
        drop(children);
        work.prepare_cached("DELETE FROM snapshots WHERE id = ?")?.execute([id.0])?;
        work.commit()?;
        Ok((id, lazy))
    }

    /// What is known of a snapshot.
    pub(crate) fn stat(&self, key: &str) -> Result<Info, StoreError> {
        let connection = self.connection.lock();
        info(&connection, key)
    }

    /// Changes labels, and returns what is known now.
    pub(crate) fn update(&self, key: &str, update: Update) -> Result<Info, StoreError> {
        let mut connection = self.connection.lock();
        let work = connection.transaction()?;
        let before = info(&work, key)?;
        let mut labels = match update {
            Update::Replace(labels) => labels,
            Update::Set(some) => before.labels.into_iter().chain(some).collect(),
        };
        labels.retain(|_, value| !value.is_empty());
        let now = nanos(SystemTime::now());
        work.prepare_cached("UPDATE snapshots SET updated = ?2, labels = ?3 WHERE name = ?1")?
            .execute(params![key, now, encode(&labels)])?;
        let after = info(&work, key)?;
        work.commit()?;
        Ok(after)
    }

    /// All snapshots.
    pub(crate) fn list(&self) -> Result<Vec<Info>, StoreError> {
        let connection = self.connection.lock();
        let mut all = connection.prepare_cached(&format!("{SELECT_INFO} ORDER BY child.id"))?;
        let all = all.query_map([], read_info)?;
        Ok(all.collect::<Result<_, _>>()?)
    }

    /// What the mounts of a snapshot are made from.
    pub(crate) fn lineage(&self, key: &str) -> Result<Lineage, StoreError> {
        let connection = self.connection.lock();
        let Record { id, kind, parent_id, .. } = found(&connection, key)?;
        Ok(Lineage { id, kind, below: below(&connection, parent_id)? })
    }

    /// What a snapshot on `parent` would be made on.
    pub(crate) fn below(&self, parent: &str) -> Result<Below, StoreError> {
        let connection = self.connection.lock();
        let parent = committed(&connection, parent)?;
        below(&connection, parent)
    }

    /// What the snapshot with this number is made on; nothing if there is none.
    pub(crate) fn below_id(&self, id: SnapshotId) -> Result<Below, StoreError> {
        let connection = self.connection.lock();
        let mut parent = connection.prepare_cached("SELECT parent FROM snapshots WHERE id = ?")?;
        let parent: Option<Option<i64>> = parent.query_row([id.0], |row| row.get(0)).optional()?;
        below(&connection, parent.flatten().map(SnapshotId))
    }

    /// What is known of what a snapshot takes.
    pub(crate) fn usage(&self, key: &str) -> Result<KnownUsage, StoreError> {
        let connection = self.connection.lock();
        let Record { id, kind, usage, lazy, .. } = found(&connection, key)?;
        Ok(KnownUsage { id, kind, usage, lazy })
    }

    /// Whether a snapshot has this layer, by its digest.
    pub(crate) fn has_layer(&self, digest: &str) -> Result<bool, StoreError> {
        let connection = self.connection.lock();
        let mut having = connection
            .prepare_cached("SELECT 1 FROM snapshots WHERE lazy ->> 'layer' = ? LIMIT 1")?;
        Ok(having.exists([digest])?)
    }

    /// Notes what a committed snapshot takes.
    pub(crate) fn set_usage(&self, id: SnapshotId, usage: Usage) -> Result<(), StoreError> {
        let connection = self.connection.lock();
        let [bytes, inodes] =
            [usage.bytes, usage.inodes].map(|n| i64::try_from(n).unwrap_or(i64::MAX));
        connection
            .prepare_cached(
                "UPDATE snapshots SET bytes = ?2, inodes = ?3 WHERE id = ?1 AND kind = ?4",
            )?
            .execute(params![id.0, bytes, inodes, Kind::Committed.number()])?;
        Ok(())
    }

    /// Lets `look` see the numbers of all snapshots, while there can be no new ones. Those that were removed
    /// stay so, whatever happens.
    pub(crate) fn with_ids<T>(
        &self,
        look: impl FnOnce(&HashSet<SnapshotId>) -> T,
    ) -> Result<T, StoreError> {
        let connection = self.connection.lock();
        connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))?;
        let mut all = connection.prepare_cached("SELECT id FROM snapshots")?;
        let all = all.query_map([], |row| Ok(SnapshotId(row.get(0)?)))?;
        Ok(look(&all.collect::<Result<_, _>>()?))
    }
}

/// The connection, while what it commits is on the disk at once, with all that was committed before.
struct Lasting<'a>(&'a mut Connection);

impl<'a> Lasting<'a> {
    fn begin(connection: &'a mut Connection) -> rusqlite::Result<Self> {
        connection.pragma_update(None, "synchronous", "FULL")?;
        Ok(Self(connection))
    }
}

impl Drop for Lasting<'_> {
    fn drop(&mut self) {
        // If this fails, the next calls are only slower.
        self.0.pragma_update(None, "synchronous", "NORMAL").ok();
    }
}

/// A row.
struct Record {
    id: SnapshotId,
    kind: Kind,
    parent_id: Option<SnapshotId>,
    parent: Option<String>,
    usage: Option<Usage>,
    lazy: Option<LazyLayer>,
}

fn find(connection: &Connection, key: &str) -> Result<Option<Record>, StoreError> {
    let mut select = connection.prepare_cached(
        "SELECT child.id, child.kind, child.parent, parent.name, child.bytes, child.inodes,
                child.lazy
         FROM snapshots AS child LEFT JOIN snapshots AS parent ON child.parent = parent.id
         WHERE child.name = ?",
    )?;
    let read = |row: &Row<'_>| {
        let (bytes, inodes): (Option<i64>, Option<i64>) = (row.get(4)?, row.get(5)?);
        let count = |n: i64| u64::try_from(n).unwrap_or_default();
        Ok(Record {
            id: SnapshotId(row.get(0)?),
            kind: Kind::of(row.get(1)?),
            parent_id: row.get::<_, Option<i64>>(2)?.map(SnapshotId),
            parent: row.get(3)?,
            usage: bytes
                .zip(inodes)
                .map(|(bytes, inodes)| Usage { bytes: count(bytes), inodes: count(inodes) }),
            lazy: read_lazy(row.get(6)?, 6)?,
        })
    };
    Ok(select.query_row([key], read).optional()?)
}

/// What a column says of a layer that was not unpacked.
fn read_lazy(text: Option<String>, column: usize) -> rusqlite::Result<Option<LazyLayer>> {
    let lazy = text.map(|text| serde_json::from_str(&text)).transpose();
    lazy.map_err(|err| not_json(column, err))
}

fn found(connection: &Connection, key: &str) -> Result<Record, StoreError> {
    find(connection, key)?.ok_or_else(|| StoreError::Missing(key.to_owned()))
}

/// The snapshot that others are to be made on; none for no name.
fn committed(connection: &Connection, parent: &str) -> Result<Option<SnapshotId>, StoreError> {
    if parent.is_empty() {
        return Ok(None);
    }
    match found(connection, parent)? {
        Record { id, kind: Kind::Committed, .. } => Ok(Some(id)),
        Record { .. } => Err(StoreError::ParentNotCommitted { parent: parent.to_owned() }),
    }
}

fn below(connection: &Connection, nearest: Option<SnapshotId>) -> Result<Below, StoreError> {
    let mut select = connection.prepare_cached(
        "WITH RECURSIVE line (id, parent, lazy, depth) AS (
             SELECT id, parent, lazy, 0 FROM snapshots WHERE id = ?
             UNION ALL
             SELECT next.id, next.parent, next.lazy, depth + 1
             FROM line JOIN snapshots AS next ON next.id = line.parent WHERE line.lazy IS NULL
         ) SELECT id, lazy FROM line ORDER BY depth",
    )?;
    let (mut parents, mut lowest) = (Vec::new(), None);
    let mut line = select.query([nearest.map(|id| id.0)])?;
    while let Some(row) = line.next()? {
        parents.push(SnapshotId(row.get(0)?));
        lowest = row.get::<_, Option<String>>(1)?;
    }
    Ok(Below { parents, lazy: read_lazy(lowest, 1)? })
}

fn not_json(column: usize, err: serde_json::Error) -> rusqlite::Error {
    let text = rusqlite::types::Type::Text;
    rusqlite::Error::FromSqlConversionFailure(column, text, Box::new(err))
}

fn info(connection: &Connection, key: &str) -> Result<Info, StoreError> {
    let mut select = connection.prepare_cached(&format!("{SELECT_INFO} WHERE child.name = ?"))?;
    let info = select.query_row([key], read_info).optional()?;
    info.ok_or_else(|| StoreError::Missing(key.to_owned()))
}

const SELECT_INFO: &str =
    "SELECT child.name, parent.name, child.kind, child.created, child.updated, child.labels
     FROM snapshots AS child LEFT JOIN snapshots AS parent ON child.parent = parent.id";

fn read_info(row: &Row<'_>) -> rusqlite::Result<Info> {
    let labels: String = row.get(5)?;
    let labels = serde_json::from_str(&labels).map_err(|err| not_json(5, err))?;
    Ok(Info {
        name: row.get(0)?,
        parent: row.get(1)?,
        kind: Kind::of(row.get(2)?),
        created: time(row.get(3)?),
        updated: time(row.get(4)?),
        labels,
    })
}

fn encode(labels: &BTreeMap<String, String>) -> String {
    serde_json::to_string(labels).expect("a map of strings is JSON")
}

/// Nanoseconds since 1970, until the year 2262.
fn nanos(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

fn time(nanos: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(nanos).unwrap_or_default())
}

#[cfg(test)]
mod tests;
