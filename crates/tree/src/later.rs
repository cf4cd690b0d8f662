//! A tree that is made when somebody needs it: a mounted EROFS goes on without.

use std::sync::{Arc, OnceLock};

use ztoc::{ReadTocError, Toc};

use crate::{Limits, MergeError, Tree};

/// The tree of an image, made at most once.
#[derive(Debug)]
pub struct LaterTree {
    tables: Vec<Arc<Toc>>,
    limits: Limits,
    tree: OnceLock<Result<Arc<Tree>, MakeTreeError>>,
}

/// The tree cannot be made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MakeTreeError {
    /// A layer's table of contents is lost.
    #[error(transparent)]
    Read(#[from] ReadTocError),
    /// The tables of contents do not come to a tree.
    #[error("merging the layers")]
    Merge(#[from] MergeError),
}

impl From<Arc<Tree>> for LaterTree {
    fn from(tree: Arc<Tree>) -> Self {
        let (tables, limits) = (Vec::new(), Limits::default());
        Self { tables, limits, tree: OnceLock::from(Ok(tree)) }
    }
}

impl LaterTree {
    /// The tree of layers with these tables of contents, the lowest first.
    #[must_use]
    pub const fn new(tables: Vec<Arc<Toc>>, limits: Limits) -> Self {
        Self { tables, limits, tree: OnceLock::new() }
    }

    /// The tree. Whoever asks first makes it; the others wait for him.
    ///
    /// # Errors
    /// When it cannot be made; that does not change any more.
    pub fn get(&self) -> Result<&Arc<Tree>, MakeTreeError> {
        let make = || {
            let tables = self.tables.iter().map(|toc| toc.read());
            let tables = tables.collect::<Result<Vec<_>, _>>()?;
            let tables: Vec<_> = tables.iter().map(|entries| entries.as_slice()).collect();
            Ok(Arc::new(Tree::merge(&tables, &self.limits)?))
        };
        self.tree.get_or_init(make).as_ref().map_err(MakeTreeError::clone)
    }
}
