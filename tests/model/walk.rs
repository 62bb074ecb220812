//! Everything that a view shows, as a value that can be compared.

use cowfs::engine::Engine;
use cowfs::engine::handle::OpenFile;
use cowfs::engine::nodes::{Node, NodeId, ROOT_NODE};
use cowfs::ids::BLOCK;
use cowfs::store::AttrImage;
use std::collections::{BTreeMap, HashMap};

/// What is seen of one path.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Stat fields, without the number of blocks: allocation is the backing filesystem's affair.
    pub attr: AttrImage,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub data: Vec<u8>,
    /// Blocks that are data, by SEEK_DATA and SEEK_HOLE.
    pub map: Vec<(u64, u64)>,
    pub target: Vec<u8>,
    /// The first path of the same object.
    pub first: Vec<u8>,
    pub node: NodeId,
}

pub type View = BTreeMap<Vec<u8>, Seen>;

/// Walks a view from `root`. Every node that is looked up is forgotten again if `forget`.
pub fn walk(engine: &Engine, root: NodeId, forget: bool) -> Result<View, String> {
    let mut walk = Walk {
        engine,
        view: View::new(),
        first: HashMap::new(),
        forget,
    };
    walk.visit(root, b"/".to_vec())
        .map_err(|error| error.to_string())?;
    for seen in walk.view.values_mut() {
        seen.first = walk.first[&seen.node].clone();
    }
    Ok(walk.view)
}

struct Walk<'a> {
    engine: &'a Engine,
    view: View,
    first: HashMap<NodeId, Vec<u8>>,
    forget: bool,
}

impl Walk<'_> {
    fn visit(&mut self, id: NodeId, path: Vec<u8>) -> cowfs::error::Result<()> {
        let engine = self.engine;
        let node = engine.node(id)?;
        let first = self.first.entry(id).or_insert_with(|| path.clone());
        if path < *first {
            first.clone_from(&path);
        }
        let mut attr = engine.getattr(&node, None)?;
        attr.image.blocks = 0;
        let mut seen = Seen {
            xattrs: BTreeMap::new(),
            data: Vec::new(),
            map: Vec::new(),
            target: Vec::new(),
            first: Vec::new(),
            node: id,
            attr: attr.image,
        };
        for name in engine.listxattr(&node)? {
            let value = engine.getxattr(&node, &name)?;
            seen.xattrs.insert(name, value);
        }
        match seen.attr.mode & libc::S_IFMT {
            libc::S_IFREG => {
                let file = engine.open_file(&node, libc::O_RDONLY)?;
                seen.data = read(engine, &file)?;
                seen.map = data_map(engine, &file, seen.attr.size)?;
            }
            libc::S_IFLNK => seen.target = engine.read_link(&node)?,
            libc::S_IFDIR => {
                self.view.insert(path.clone(), seen);
                return self.children(&node, &path);
            }
            _ => {}
        }
        self.view.insert(path, seen);
        Ok(())
    }

    fn children(&mut self, node: &Node, path: &[u8]) -> cowfs::error::Result<()> {
        let dir = self.engine.open_dir(node)?;
        let mut lines = Vec::new();
        self.engine.read_dir(&dir, 0, |line| {
            lines.push(line.clone());
            Ok(true)
        })?;
        for line in lines {
            if line.name == b"." || line.name == b".." {
                continue;
            }
            let found = self.engine.lookup(node, &line.name)?;
            if found.node != ROOT_NODE {
                assert_eq!(found.node, line.ino, "d_ino differs from st_ino");
            }
            let mut deeper = path.to_vec();
            if deeper != b"/" {
                deeper.push(b'/');
            }
            deeper.extend(&line.name);
            assert!(!self.view.contains_key(&deeper), "a name is listed twice");
            self.visit(found.node, deeper)?;
            if self.forget {
                self.engine.nodes.forget(found.node, 1);
            }
        }
        Ok(())
    }
}

fn read(engine: &Engine, file: &OpenFile) -> cowfs::error::Result<Vec<u8>> {
    let mut data = Vec::new();
    // An odd size, so that pieces begin and end within blocks.
    let mut buf = vec![0; 70_001];
    loop {
        let n = engine.read(file, data.len() as u64, &mut buf)?;
        let mut again = vec![0; buf.len()];
        if let Some(quick) = engine.read_cached(file, data.len() as u64, &mut again)? {
            assert_eq!(again[..quick], buf[..n], "the quick read differs");
        }
        if n == 0 {
            return Ok(data);
        }
        data.extend(&buf[..n]);
    }
}

/// The data of a file in blocks `(first, past the last)`.
fn data_map(engine: &Engine, file: &OpenFile, size: u64) -> cowfs::error::Result<Vec<(u64, u64)>> {
    let mut map = Vec::new();
    let mut at = 0;
    while at < size {
        let Ok(data) = engine.seek(file, at, false) else {
            break;
        };
        let hole = engine.seek(file, data, true)?;
        assert!(
            data >= at && hole > data && hole <= size,
            "{at} {data} {hole} {size}"
        );
        let block = BLOCK as u64;
        map.push((data / block, hole.div_ceil(block)));
        at = hole;
    }
    Ok(map)
}
