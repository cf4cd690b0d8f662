//! Unpacking one layer by itself, as containerd's untar does into an empty directory.

use std::{
    collections::{BTreeMap, VecDeque},
    mem,
};

use ztoc::{EntryKind, TocEntry};

use crate::{
    FileData, Node, NodeId, NodeKind,
    error::{EntryError, MergeError},
    merge::{Arena, LayerMarks, Marks, empty_directory},
    names::{OPAQUE, WHITEOUT, WHITEOUT_META, check_path_len, clean, entry_path},
    xattr,
};

/// How many symbolic links one path may lead through, as in containerd's `fs.RootPath`.
const MAX_SYMLINKS: usize = 255;
/// Linux' `PATH_MAX` without its NUL.
const MAX_TARGET_BYTES: usize = 4095;
/// Linux' largest file offset.
const MAX_OFFSET: u64 = i64::MAX.cast_unsigned();

/// Makes the nodes of a layer below the empty directory `root`. `lower` is the root of the layers
/// below, where hard links may lead; it is not changed.
pub(crate) fn apply_layer(
    arena: &mut Arena,
    layer: u32,
    entries: &[TocEntry],
    root: NodeId,
    lower: NodeId,
) -> Result<LayerMarks, MergeError> {
    let marks = LayerMarks::from([(root, Marks { is_implicit: true, ..Marks::default() })]);
    let mut applied = Layer { arena, layer, root, lower, marks };
    for entry in entries {
        applied.apply(entry).map_err(|refused| match refused {
            Refused::Entry(source) => MergeError::Entry { layer, name: entry.name.clone(), source },
            Refused::Merge(error) => error,
        })?;
    }
    Ok(applied.marks)
}

/// Why an entry was not applied: its own fault, or that of all together.
enum Refused {
    Entry(EntryError),
    Merge(MergeError),
}

impl From<EntryError> for Refused {
    fn from(error: EntryError) -> Self {
        Self::Entry(error)
    }
}

impl From<MergeError> for Refused {
    fn from(error: MergeError) -> Self {
        Self::Merge(error)
    }
}

struct Layer<'a> {
    arena: &'a mut Arena,
    layer: u32,
    root: NodeId,
    lower: NodeId,
    marks: LayerMarks,
}

impl Layer<'_> {
    fn apply(&mut self, entry: &TocEntry) -> Result<(), Refused> {
        let path = entry_path(&entry.name, self.arena.limits.max_path_bytes)?;
        let Some((&base, parents)) = path.split_last() else {
            return self.apply_to_root(entry);
        };
        let is_meta = |name: &&[u8]| name.starts_with(WHITEOUT_META);
        if parents.iter().any(is_meta) || (is_meta(&base) && base != OPAQUE) {
            return Ok(());
        }
        let hidden = base.strip_prefix(WHITEOUT);
        if matches!(hidden, Some(b"" | b"." | b"..")) {
            return Err(EntryError::BadName.into());
        }
        let directory = self.make_directory(parents)?;
        match hidden {
            _ if base == OPAQUE => self.marks.entry(directory).or_default().is_opaque = true,
            Some(hidden) => self.hide(directory, hidden),
            None => self.apply_file(directory, base, entry)?,
        }
        Ok(())
    }

    /// An entry for the root gives it metadata; it cannot be anything but a directory.
    fn apply_to_root(&mut self, entry: &TocEntry) -> Result<(), Refused> {
        if entry.kind == EntryKind::Directory {
            self.describe_directory(self.root, entry)?;
        }
        Ok(())
    }

    fn apply_file(&mut self, at: NodeId, name: &[u8], entry: &TocEntry) -> Result<(), Refused> {
        let there = self.arena.children_mut(at).get(name).copied();
        if entry.kind == EntryKind::Directory
            && let Some(there) = there
            && self.arena.nodes[there.index()].is_directory()
        {
            return Ok(self.describe_directory(there, entry)?);
        }
        // First out of the way, then looked for: a link to what it replaces has no target.
        self.arena.children_mut(at).remove(name);
        let id = match self.kind_of(entry)? {
            Made::Node(kind) => {
                let node = described(entry, kind)?;
                self.arena.push(node)?
            }
            Made::Link => self.find_link_target(&entry.linkname)?,
            Made::Whiteout => {
                self.hide(at, name);
                return Ok(());
            }
        };
        self.arena.children_mut(at).insert(name.into(), id);
        Ok(())
    }

    fn kind_of(&self, entry: &TocEntry) -> Result<Made, EntryError> {
        let (major, minor) = entry.device;
        Ok(Made::Node(match entry.kind {
            EntryKind::File => NodeKind::File(file_data(self.layer, entry)?),
            EntryKind::Directory => NodeKind::Directory(BTreeMap::new()),
            EntryKind::Symlink => NodeKind::Symlink(symlink_target(&entry.linkname)?),
            EntryKind::HardLink => return Ok(Made::Link),
            EntryKind::CharDevice if entry.device == (0, 0) => return Ok(Made::Whiteout),
            EntryKind::CharDevice => NodeKind::CharDevice(major, minor),
            EntryKind::BlockDevice => NodeKind::BlockDevice(major, minor),
            EntryKind::Fifo => NodeKind::Fifo,
        }))
    }

    fn hide(&mut self, directory: NodeId, name: &[u8]) {
        self.marks.entry(directory).or_default().whiteouts.insert(name.into());
    }

    fn describe_directory(&mut self, id: NodeId, entry: &TocEntry) -> Result<(), EntryError> {
        let described = described(entry, NodeKind::Fifo)?;
        let node = &mut self.arena.nodes[id.index()];
        let kind = mem::replace(&mut node.kind, NodeKind::Fifo);
        *node = Node { kind, ..described };
        if let Some(marks) = self.marks.get_mut(&id) {
            marks.is_implicit = false;
        }
        Ok(())
    }

    /// The directory of that path in this layer, made with its parents if it is missing.
    fn make_directory(&mut self, path: &[&[u8]]) -> Result<NodeId, Refused> {
        let mut at = self.root;
        for name in path {
            let there = self.arena.children_mut(at).get(*name).copied();
            at = match there.map(|there| (there, &self.arena.nodes[there.index()].kind)) {
                None => self.make_implicit(at, name)?,
                Some((there, NodeKind::Directory(_))) => there,
                // Nothing was made so far: below what is missing there are no links.
                Some((_, NodeKind::Symlink(_))) => return self.make_resolved_directory(path),
                Some(_) => return Err(EntryError::NotADirectory.into()),
            };
        }
        Ok(at)
    }

    fn make_resolved_directory(&mut self, path: &[&[u8]]) -> Result<NodeId, Refused> {
        let mut at = self.root;
        for step in resolve(self.arena, self.root, path)? {
            at = match step.node {
                None => self.make_implicit(at, &step.name)?,
                Some(there) if self.arena.nodes[there.index()].is_directory() => there,
                Some(_) => return Err(EntryError::NotADirectory.into()),
            };
        }
        Ok(at)
    }

    fn make_implicit(&mut self, at: NodeId, name: &[u8]) -> Result<NodeId, MergeError> {
        let made = self.arena.push(empty_directory())?;
        self.marks.insert(made, Marks { is_implicit: true, ..Marks::default() });
        self.arena.children_mut(at).insert(name.into(), made);
        Ok(made)
    }

    /// The node that a hard link names, in this layer or else in those below. The last name is not
    /// followed if it is a symbolic link: links to symbolic links are what tar means.
    fn find_link_target(&mut self, target: &[u8]) -> Result<NodeId, Refused> {
        let path = entry_path(target, self.arena.limits.max_path_bytes)?;
        let Some((&base, parents)) = path.split_last() else {
            return Err(EntryError::HardLinkToDirectory.into());
        };
        for root in [self.root, self.lower] {
            let at = match resolve(self.arena, root, parents) {
                Ok(steps) => steps.last().map_or(Some(root), |step| step.node),
                Err(EntryError::NotADirectory) => None,
                Err(error) => return Err(error.into()),
            };
            let found = at.and_then(|at| self.arena.children(at)?.get(base).copied());
            if let Some(found) = found {
                if self.arena.nodes[found.index()].is_directory() {
                    return Err(EntryError::HardLinkToDirectory.into());
                }
                self.arena.count()?;
                return Ok(found);
            }
        }
        Err(EntryError::HardLinkTarget.into())
    }
}

/// What an entry makes.
enum Made {
    Node(NodeKind),
    Link,
    Whiteout,
}

/// A component of a path that leads through no symbolic link.
struct Step {
    name: Box<[u8]>,
    /// What is there.
    node: Option<NodeId>,
}

/// Follows the symbolic links in `path`, all of it, without leaving `root`. As containerd's
/// `fs.RootPath`: what is missing is kept as a name, and `..` in a target is taken lexically.
fn resolve(arena: &mut Arena, root: NodeId, path: &[&[u8]]) -> Result<Vec<Step>, EntryError> {
    let mut steps: Vec<Step> = Vec::with_capacity(path.len());
    let mut rest: VecDeque<Box<[u8]>> = path.iter().map(|name| Box::from(*name)).collect();
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        let at = steps.last().map_or(Some(root), |step| step.node);
        let node = match at {
            Some(at) => {
                let children = arena.children(at).ok_or(EntryError::NotADirectory)?;
                children.get(&name).copied()
            }
            None => None,
        };
        let Some(NodeKind::Symlink(target)) = node.map(|node| &arena.nodes[node.index()].kind)
        else {
            steps.push(Step { name, node });
            continue;
        };
        links += 1;
        if links > MAX_SYMLINKS {
            return Err(EntryError::SymlinkLoop);
        }
        let target = target.clone();
        back_up(&mut steps, &target);
        for name in clean(&target).into_iter().rev() {
            rest.push_front(name.into());
        }
        arena.pay_symlink(target.len() + steps.len() + rest.len())?;
        let lens = steps.iter().map(|step| step.name.len());
        check_path_len(
            lens.chain(rest.iter().map(|name| name.len())),
            arena.limits.max_path_bytes,
        )?;
    }
    Ok(steps)
}

/// Takes from `steps` as many names as the `..` at the front of a link's target (after cleaning)
/// say, and all of them for an absolute target.
fn back_up(steps: &mut Vec<Step>, target: &[u8]) {
    if target.starts_with(b"/") {
        steps.clear();
        return;
    }
    let mut depth = 0_usize;
    for component in target.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if depth == 0 => {
                steps.pop();
            }
            b".." => depth -= 1,
            _ => depth += 1,
        }
    }
}

fn described(entry: &TocEntry, kind: NodeKind) -> Result<Node, EntryError> {
    Ok(Node {
        kind,
        mode: u16::try_from(entry.mode & 0o7777).expect("twelve bits"),
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        xattrs: xattr::kept(entry)?,
        links: 0,
    })
}

fn symlink_target(target: &[u8]) -> Result<Box<[u8]>, EntryError> {
    if target.is_empty() || target.len() > MAX_TARGET_BYTES || target.contains(&0) {
        return Err(EntryError::BadSymlinkTarget);
    }
    Ok(target.into())
}

fn file_data(layer: u32, entry: &TocEntry) -> Result<FileData, EntryError> {
    let end = entry.offset.checked_add(entry.size).filter(|end| *end <= MAX_OFFSET);
    if end.is_none() || entry.logical_size() > MAX_OFFSET {
        return Err(EntryError::BadData);
    }
    if let Some(map) = &entry.sparse {
        let mut free_from = 0;
        let mut stored = 0_u64;
        for &(offset, len) in &map.pieces {
            let end = offset.checked_add(len).ok_or(EntryError::BadData)?;
            if offset < free_from || end > map.logical_size {
                return Err(EntryError::BadData);
            }
            free_from = end;
            // Disjoint pieces within the file: the sum is not more than its size.
            stored += len;
        }
        if stored != entry.size {
            return Err(EntryError::BadData);
        }
    }
    Ok(FileData {
        layer,
        offset: entry.offset,
        size: entry.logical_size(),
        sparse: entry.sparse.clone(),
    })
}
