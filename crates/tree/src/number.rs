//! The last step of a merge: dense numbers in preorder, link counts, and what is found by number.

use std::mem;

use crate::{
    Node, NodeId, NodeKind, StoredFile, Tree,
    merge::{Arena, empty_directory},
    names::NameTable,
};

/// Numbers given so far. Nodes that nothing refers to any more never get one.
#[derive(Debug, Default)]
struct Numbering {
    /// By old number.
    new: Vec<Option<NodeId>>,
    /// By new number.
    old: Vec<NodeId>,
    parents: Vec<NodeId>,
    names: NameTable,
    links: Vec<u32>,
}

impl Arena {
    /// The tree below `root`.
    pub(crate) fn into_tree(self, root: NodeId) -> Tree {
        let mut numbering = Numbering { new: vec![None; self.nodes.len()], ..Default::default() };
        number(&self, root, &mut numbering);

        let Numbering { new, old, parents, names, links } = numbering;
        let mut unnumbered = self.nodes;
        let nodes = old.iter().zip(links).map(|(old, links)| {
            let mut node = mem::replace(&mut unnumbered[old.index()], empty_directory());
            node.links = links;
            if let NodeKind::Directory(children) = &mut node.kind {
                for child in children.values_mut() {
                    *child = new[child.index()].expect("children of a numbered node are numbered");
                }
            }
            node
        });
        let nodes: Vec<Node> = nodes.collect();
        let stored = stored_files(&nodes);
        Tree { nodes, parents, names, stored }
    }
}

/// Walks in preorder, without recursion: paths may have thousands of components.
fn number(arena: &Arena, root: NodeId, to: &mut Numbering) {
    let mut stack = vec![(root, Tree::ROOT, [].as_slice())];
    while let Some((node, parent, name)) = stack.pop() {
        if let Some(seen) = to.new[node.index()] {
            to.links[seen.index()] += 1;
            continue;
        }
        let id = NodeId(u32::try_from(to.old.len()).expect("the arena numbers nodes in 32 bits"));
        to.new[node.index()] = Some(id);
        to.old.push(node);
        to.parents.push(parent);
        to.names.push(name);
        let Some(children) = arena.children(node) else {
            to.links.push(1);
            continue;
        };
        to.links.push(2);
        if id != Tree::ROOT {
            to.links[parent.index()] += 1;
        }
        stack.extend(children.iter().rev().map(|(name, child)| (*child, id, &**name)));
    }
}

fn stored_files(nodes: &[Node]) -> Vec<StoredFile> {
    let mut stored: Vec<StoredFile> = (0_u32..)
        .zip(nodes)
        .filter_map(|(id, node)| match &node.kind {
            NodeKind::File(data) => Some(StoredFile {
                layer: data.layer,
                offset: data.offset,
                size: data.stored_bytes(),
                node: NodeId(id),
            }),
            _ => None,
        })
        .filter(|file| file.size > 0)
        .collect();
    stored.sort_unstable();
    stored
}
