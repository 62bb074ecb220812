//! The borders of the source, read off its text: who may name whom (docs/ARCHITECTURE.md, "The dependency rule").

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

/// What must not be named, and where it may be after all (a prefix of the path below `src/`).
const BORDERS: &[(&[&str], &[&str])] = &[
    (&["fuser::", "fuser;", "extern crate fuser"], &["fuse/"]),
    (&["sled::", "sled;"], &["store/index.rs"]),
    (&["unsafe "], &["sys.rs"]),
    // A process that is started would inherit the copy: fcntl_dupfd_cloexec.
    (&["io::dup("], &[]),
    (&["std::sync", "crossbeam", "parking_lot"], &["sync.rs"]),
    (&["crate::cli"], &["cli/"]),
    (&["crate::fuse"], &["cli/", "fuse/"]),
    (&["crate::engine"], &["cli/", "fuse/", "engine/"]),
    (&["crate::store"], &["cli/", "fuse/", "engine/", "store/"]),
    (&["crate::config"], &["cli/", "fuse/", "engine/"]),
    (&["crate::control"], &["cli/", "fuse/"]),
    (&["crate::mounts"], &["cli/", "fuse/", "control.rs"]),
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn nothing_is_named_across_a_border() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 40, "the sources were found: {}", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let name = file
            .strip_prefix(&root)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        for (number, line) in (1..).zip(std::fs::read_to_string(&file).unwrap().lines()) {
            let code = line.split("//").next().unwrap();
            for (words, places) in BORDERS {
                let here = places.iter().any(|place| name.starts_with(place));
                if !here && words.iter().any(|word| code.contains(word)) {
                    wrong.push(format!("src/{name}:{number}: {}", line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
