//! A path in an image: as a process with the image as its root would resolve it.

use crate::{FileData, NodeId, NodeKind, Tree};

/// A path that does not lead to a regular file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// A name on the way does not exist.
    #[error("{} does not exist in the image", path.escape_ascii())]
    Missing {
        /// Path of the name that is not there.
        path: Vec<u8>,
    },
    /// It leads to something without bytes, or through something that is no directory.
    #[error("{} is {what}", path.escape_ascii())]
    Wrong {
        /// Path of the culprit.
        path: Vec<u8>,
        /// What it is.
        what: &'static str,
    },
    /// Symbolic links lead in a circle, or nearly.
    #[error("the path leads through more than {MAX_SYMLINKS} symbolic links")]
    TooManyLinks,
}

impl Tree {
    /// The regular file at `path`; symbolic links are followed and never leave the image.
    ///
    /// # Errors
    /// [`ResolveError`] names what stood in the way.
    pub fn resolve(&self, path: &[u8]) -> Result<(NodeId, &FileData), ResolveError> {
        let tree = self;
        let mut links = 0;
        let mut at = Self::ROOT;
        // What is still to be walked, the next name last.
        let mut names: Vec<&[u8]> = path.split(|byte| *byte == b'/').rev().collect();
        while let Some(name) = names.pop() {
            if !tree.node(at).is_directory() {
                return Err(wrong(tree, at));
            }
            match name {
                b"" | b"." => continue,
                b".." => {
                    at = tree.parent(at);
                    continue;
                }
                _ => {}
            }
            let Some(child) = tree.child(at, name) else {
                let mut path = absolute(tree, at);
                path.extend_from_slice(if at == Self::ROOT { b"" } else { b"/" });
                path.extend_from_slice(name);
                return Err(ResolveError::Missing { path });
            };
            let NodeKind::Symlink(target) = &tree.node(child).kind else {
                at = child;
                continue;
            };
            links += 1;
            if links > MAX_SYMLINKS {
                return Err(ResolveError::TooManyLinks);
            }
            if target.starts_with(b"/") {
                at = Self::ROOT;
            }
            names.extend(target.split(|byte| *byte == b'/').rev());
        }
        match &tree.node(at).kind {
            NodeKind::File(data) => Ok((at, data)),
            _ => Err(wrong(tree, at)),
        }
    }
}

fn wrong(tree: &Tree, node: NodeId) -> ResolveError {
    let what = match &tree.node(node).kind {
        NodeKind::Directory(_) => "a directory",
        NodeKind::File(_) => "a file, not a directory",
        NodeKind::Symlink(_) => "a symbolic link",
        NodeKind::CharDevice(..) | NodeKind::BlockDevice(..) => "a device",
        NodeKind::Fifo => "a named pipe",
    };
    ResolveError::Wrong { path: absolute(tree, node), what }
}

fn absolute(tree: &Tree, node: NodeId) -> Vec<u8> {
    [b"/".as_slice(), &tree.path_of(node)].concat()
}

/// As many as Linux follows.
const MAX_SYMLINKS: u32 = 40;

#[cfg(test)]
mod tests {
    use testkit::image::LayerBuilder;

    use super::*;

    fn tree() -> Tree {
        let tar = LayerBuilder::new()
            .dir("usr")
            .dir("usr/lib")
            .file("usr/lib/a", b"aaa".to_vec())
            .symlink("lib", "usr/lib")
            .symlink("absolute", "/lib/a")
            .symlink("usr/lib/up", "../../../../usr/./lib//a")
            .symlink("loop", "loop")
            .symlink("dangling", "usr/none")
            .symlink("through", "usr/lib/a/b")
            .hard_link("zz-hard", "usr/lib/a")
            .build();
        let mut indexer = ztoc::TarScanner::new(ztoc::Limits::default());
        indexer.push(&tar).unwrap();
        let toc = indexer.finish().unwrap().entries;
        Tree::merge(&[&toc], &crate::Limits::default()).unwrap()
    }

    #[test]
    fn paths_are_walked_as_the_kernel_walks_them() {
        let tree = tree();
        for path in [
            "usr/lib/a",
            "/usr/lib/a",
            "lib/a",
            "absolute",
            "lib/up",
            "zz-hard",
            "//usr/../lib/./a",
            "lib/../lib/a",
            "../../usr/lib/a",
        ] {
            assert_eq!(tree.resolve(path.as_bytes()).map(|(_, data)| data.size), Ok(3), "{path}");
        }
    }

    #[test]
    fn what_is_no_file_is_named() {
        let tree = tree();
        let message = |path: &str| tree.resolve(path.as_bytes()).unwrap_err().to_string();
        for (path, expected) in [
            ("none", "/none does not exist in the image"),
            ("dangling", "/usr/none does not exist in the image"),
            ("usr", "/usr is a directory"),
            ("", "/ is a directory"),
            ("through", "/usr/lib/a is a file, not a directory"),
            ("usr/lib/a/", "/usr/lib/a is a file, not a directory"),
            ("loop", "the path leads through more than 40 symbolic links"),
        ] {
            assert_eq!(message(path), expected, "{path}");
        }
    }
}
