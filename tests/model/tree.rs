//! The reference: a tree in memory.

use std::collections::BTreeMap;

pub type Id = u64;
pub type Name = Vec<u8>;

#[derive(Clone, Debug)]
pub enum Body {
    Dir(BTreeMap<Name, Id>),
    File(Vec<u8>),
    Link(Vec<u8>),
    Fifo,
}

#[derive(Clone, Debug)]
pub struct Object {
    pub body: Body,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// All objects by identity; number 0 is the root.
#[derive(Clone, Debug)]
pub struct Tree {
    pub objects: BTreeMap<Id, Object>,
    next: Id,
}

impl Tree {
    pub fn new(mode: u32) -> Self {
        let root = Object {
            body: Body::Dir(BTreeMap::new()),
            mode,
            uid: 0,
            gid: 0,
            xattrs: BTreeMap::new(),
        };
        Self {
            objects: BTreeMap::from([(0, root)]),
            next: 1,
        }
    }

    pub fn entries(&self, dir: Id) -> &BTreeMap<Name, Id> {
        match &self.objects[&dir].body {
            Body::Dir(entries) => entries,
            _ => panic!("not a directory"),
        }
    }

    pub fn entries_mut(&mut self, dir: Id) -> &mut BTreeMap<Name, Id> {
        match &mut self.objects.get_mut(&dir).unwrap().body {
            Body::Dir(entries) => entries,
            _ => panic!("not a directory"),
        }
    }

    pub fn data_mut(&mut self, file: Id) -> &mut Vec<u8> {
        match &mut self.objects.get_mut(&file).unwrap().body {
            Body::File(data) => data,
            _ => panic!("not a file"),
        }
    }

    pub fn is_dir(&self, id: Id) -> bool {
        matches!(self.objects[&id].body, Body::Dir(_))
    }

    pub fn is_file(&self, id: Id) -> bool {
        matches!(self.objects[&id].body, Body::File(_))
    }

    pub fn add(&mut self, dir: Id, name: &[u8], body: Body, mode: u32) -> Id {
        let id = self.next;
        self.next += 1;
        let object = Object {
            body,
            mode,
            uid: 0,
            gid: 0,
            xattrs: BTreeMap::new(),
        };
        self.objects.insert(id, object);
        self.entries_mut(dir).insert(name.to_vec(), id);
        id
    }

    /// Every path with the object it means, the root first.
    pub fn paths(&self) -> Vec<(Vec<Name>, Id)> {
        let mut all = vec![(Vec::new(), 0)];
        let mut at = 0;
        while at < all.len() {
            let (path, id) = all[at].clone();
            if let Body::Dir(entries) = &self.objects[&id].body {
                for (name, child) in entries {
                    let mut deeper = path.clone();
                    deeper.push(name.clone());
                    all.push((deeper, *child));
                }
            }
            at += 1;
        }
        all
    }

    pub fn links(&self, id: Id) -> usize {
        self.paths()
            .iter()
            .filter(|(_, other)| *other == id)
            .count()
    }

    /// Whether `inner` is `outer` or somewhere beneath it.
    pub fn contains(&self, outer: Id, inner: Id) -> bool {
        outer == inner
            || match &self.objects[&outer].body {
                Body::Dir(entries) => entries.values().any(|child| self.contains(*child, inner)),
                _ => false,
            }
    }
}
