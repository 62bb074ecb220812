//! Everything that a snapshot shows, as a value that can be compared.

use cowfs::engine::Engine;
use cowfs::engine::nodes::{Node, NodeId};
use cowfs::error::{Error, Result};
use cowfs::store::AttrImage;
use rustix::io::Errno;
use std::collections::BTreeMap;

/// What is seen of one path.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    node: NodeId,
    /// Stat fields. The number of blocks is the backing filesystem's affair, and change and access times cannot
    /// be given back to a directory that is rebuilt.
    attr: AttrImage,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    data: Vec<u8>,
}

pub type View = BTreeMap<Vec<u8>, Seen>;

/// Walks the snapshot called `name`.
pub fn snapshot(engine: &Engine, name: &[u8]) -> Result<View> {
    let folder = Node::Folder(engine.root());
    let root = engine.lookup(&folder, name)?.node;
    let mut view = View::new();
    let walked = visit(engine, root, Vec::new(), &mut view);
    engine.nodes.forget(root, 1);
    walked.map(|()| view)
}

fn visit(engine: &Engine, id: NodeId, path: Vec<u8>, view: &mut View) -> Result<()> {
    let node = engine.node(id)?;
    let mut attr = engine.getattr(&node, None)?.image;
    (attr.blocks, attr.ctime, attr.atime, attr.btime) = Default::default();
    let mut xattrs = Vec::new();
    for name in engine.listxattr(&node)? {
        let value = engine.getxattr(&node, &name)?;
        xattrs.push((name, value));
    }
    let mut data = Vec::new();
    let mut children = Vec::new();
    match attr.mode & libc::S_IFMT {
        libc::S_IFREG => {
            let file = engine.open_file(&node, libc::O_RDONLY)?;
            data = vec![0; attr.size as usize];
            if engine.read(&file, 0, &mut data)? < data.len() {
                return Err(Error::Os(Errno::IO));
            }
        }
        libc::S_IFLNK => data = engine.read_link(&node)?,
        libc::S_IFDIR => {
            let dir = engine.open_dir(&node)?;
            engine.read_dir(&dir, 0, |line| {
                children.push(line.name.clone());
                Ok(true)
            })?;
        }
        _ => {}
    }
    view.insert(
        path.clone(),
        Seen {
            node: id,
            attr,
            xattrs,
            data,
        },
    );
    for name in children {
        if name == b"." || name == b".." {
            continue;
        }
        let found = engine.lookup(&node, &name)?.node;
        let walked = visit(engine, found, [&path[..], b"/", &name].concat(), view);
        engine.nodes.forget(found, 1);
        walked?;
    }
    Ok(())
}

/// Says where two views differ.
pub fn difference(expected: &View, found: &View) -> Option<String> {
    for path in expected.keys().chain(found.keys()) {
        let shown = String::from_utf8_lossy(path);
        match (expected.get(path), found.get(path)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(a), Some(b)) if a.data != b.data && a.data.len() == b.data.len() => {
                let at = a.data.iter().zip(&b.data).position(|(a, b)| a != b);
                return Some(format!("{shown:?} differs at byte {at:?}"));
            }
            (Some(a), Some(b)) => {
                return Some(format!(
                    "{shown:?}: node {:x} or {:x}, {:?} or {:?}",
                    a.node, b.node, a.attr, b.attr
                ));
            }
            (Some(_), None) => return Some(format!("{shown:?} is missing")),
            (None, _) => return Some(format!("{shown:?} should not be there")),
        }
    }
    None
}
