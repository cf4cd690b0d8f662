//! Opening the store: the right one, or none.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::Store;
use crate::folders;

/// There is no store that may be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenStoreError {
    /// Snapshots without a store.
    #[error(
        "the metadata store {} is gone, but {snapshots} snapshots lie beside it, and containerd still counts on them. Put the store back; or, if it is lost, remove the images and containers of this snapshotter from containerd, move {} away, and start again",
        path.display(),
        path.parent().unwrap_or(path).display()
    )]
    Lost {
        /// Where it should be.
        path: PathBuf,
        /// How many there are.
        snapshots: usize,
    },
    /// Made by a later version.
    #[error(
        "the metadata store {} has version {found}, this program knows {VERSION} at most: start the version that wrote it, or a later one",
        path.display()
    )]
    Newer {
        /// Where it is.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// Not what was written.
    #[error(
        "the metadata store {} is damaged ({what}). Put a copy back; or remove the images and containers of this snapshotter from containerd, move {} away, and start again",
        path.display(),
        path.parent().unwrap_or(path).display()
    )]
    Damaged {
        /// Where it is.
        path: PathBuf,
        /// What SQLite finds.
        what: String,
    },
    /// The folder.
    #[error("looking at {}", path.display())]
    Folder {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// SQLite.
    #[error("opening the metadata store {}", path.display())]
    Database {
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
}

impl Store {
    /// Opens the store of the folder `dir`, or begins one if there are no snapshots.
    pub(crate) fn open(dir: &Path) -> Result<Self, OpenStoreError> {
        let path = dir.join(FILE);
        let snapshots = folders::all(dir)
            .map_err(|source| OpenStoreError::Folder { path: dir.to_owned(), source })?
            .len();
        let is_lost = || OpenStoreError::Lost { path: path.clone(), snapshots };
        let unusable = |source| of_database(&path, source);
        let exists = path.try_exists();
        let exists =
            exists.map_err(|source| OpenStoreError::Folder { path: path.clone(), source })?;
        if !exists && snapshots > 0 {
            return Err(is_lost());
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(&path, flags).map_err(unusable)?;
        connection.busy_timeout(BUSY).map_err(unusable)?;
        connection.set_prepared_statement_cache_capacity(32);
        // Nothing is written before it is known to be ours.
        let found = version(&connection).map_err(unusable)?;
        match found {
            VERSION => {}
            // Whoever began it died before there was anything in it.
            0 if snapshots == 0 => {}
            0 => return Err(is_lost()),
            _ => return Err(OpenStoreError::Newer { path, found }),
        }
        set_up(&connection).map_err(unusable)?;
        if found == 0 {
            begin(&mut connection).map_err(unusable)?;
        }
        check(&connection, &path)?;
        Ok(Self { connection: Mutex::new(connection) })
    }
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// SQLite need not wait for the disk but where [`Store::commit`] asks it to.
fn set_up(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // Without it a statement is compiled again whenever it is about another snapshot.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true).map(drop)
}

fn begin(connection: &mut Connection) -> rusqlite::Result<()> {
    let work = connection.transaction()?;
    work.execute_batch(SCHEMA)?;
    work.pragma_update(None, "user_version", VERSION)?;
    work.commit()
}

fn check(connection: &Connection, path: &Path) -> Result<(), OpenStoreError> {
    let says: String = connection
        .pragma_query_value(None, "quick_check", |row| row.get(0))
        .map_err(|source| of_database(path, source))?;
    if says == "ok" {
        return Ok(());
    }
    Err(OpenStoreError::Damaged { path: path.to_owned(), what: says })
}

fn of_database(path: &Path, source: rusqlite::Error) -> OpenStoreError {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    let path = path.to_owned();
    match source.sqlite_error_code() {
        Some(DatabaseCorrupt | NotADatabase) => {
            OpenStoreError::Damaged { path, what: source.to_string() }
        }
        _ => OpenStoreError::Database { path, source },
    }
}

const FILE: &str = "metadata.db";

const VERSION: i64 = 1;

/// Times are in nanoseconds since 1970; labels are a JSON object, and `lazy` a [`LazyLayer`](crate::LazyLayer) of a
/// snapshot that was not unpacked; usage is absent until it was measured.
const SCHEMA: &str = "
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    parent INTEGER REFERENCES snapshots (id),
    kind INTEGER NOT NULL,
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    labels TEXT NOT NULL,
    lazy TEXT,
    bytes INTEGER,
    inodes INTEGER
) STRICT;
CREATE INDEX children ON snapshots (parent);
";

/// How long somebody may look at the store by hand while a call waits.
const BUSY: Duration = Duration::from_secs(5);
