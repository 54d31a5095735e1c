//! Reads a tree of files for comparisons.

use crate::host::{Command, Commands, HostCommands};
use crate::locks::Cancel;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The file at a path. Paths with one inode have the same `first_name`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Found {
    pub(super) mode: u32,
    pub(super) owner: [u32; 2],
    pub(super) device: u64,
    pub(super) mtime: [i64; 2],
    pub(super) target: Option<PathBuf>,
    pub(super) sha256: Option<Vec<u8>>,
    pub(super) xattrs: BTreeMap<String, Vec<u8>>,
    pub(super) first_name: PathBuf,
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let path = c_string(path);
    let mut names = vec![0; 64 << 10];
    let len = rustix::fs::llistxattr(&path, &mut names).unwrap();
    let names = names[..len].split(|b| *b == 0).filter(|n| !n.is_empty());
    let value = |name: &str| {
        let mut value = vec![0; 64 << 10];
        let len = rustix::fs::lgetxattr(&path, name, &mut value).unwrap();
        value.truncate(len);
        value
    };
    names
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        .map(|name| (name.clone(), value(&name)))
        .collect()
}

/// Returns every path below a directory, in order. The directory itself is the empty path.
pub(super) fn scan(top: &Path) -> BTreeMap<PathBuf, Found> {
    let (mut found, mut inodes) = (BTreeMap::new(), BTreeMap::new());
    let mut paths = vec![PathBuf::new()];
    let mut work = vec![PathBuf::new()];
    while let Some(dir) = work.pop() {
        for entry in std::fs::read_dir(top.join(&dir)).unwrap() {
            let entry = entry.unwrap();
            let path = dir.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                work.push(path.clone());
            }
            paths.push(path);
        }
    }
    paths.sort();
    for path in paths {
        let full = top.join(&path);
        let stat = std::fs::symlink_metadata(&full).unwrap();
        let kind = stat.file_type();
        let first = inodes.entry(stat.ino()).or_insert_with(|| path.clone());
        let first_name = first.clone();
        found.insert(
            path,
            Found {
                mode: stat.mode(),
                owner: [stat.uid(), stat.gid()],
                device: stat.rdev(),
                mtime: [stat.mtime(), stat.mtime_nsec()],
                target: kind
                    .is_symlink()
                    .then(|| std::fs::read_link(&full).unwrap()),
                sha256: kind.is_file().then(|| {
                    let content = std::fs::read(&full).unwrap();
                    Sha256::digest(content).to_vec()
                }),
                xattrs: xattrs(&full),
                first_name,
            },
        );
    }
    found
}

/// Runs a program of the distribution.
#[track_caller]
pub(super) fn run(program: &str, args: &[&str]) -> String {
    let command = Command::new(program).args(args);
    let output = HostCommands.run(&command, &Cancel::try_new().unwrap(), &mut |_| {});
    match output {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(e) => panic!("{program} {args:?}: {e} (scripts/setup --test installs what tests need)"),
    }
}

/// True if the tests run as root, which mounts need. Otherwise prints that the test is skipped.
pub(super) fn is_root() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        let name = std::thread::current().name().map(str::to_owned);
        eprintln!("SKIPPED because it needs root: {name:?}");
    }
    is_root
}

/// A file system in a file, mounted read-only.
pub(super) struct Mounted(pub(super) tempfile::TempDir);

impl Mounted {
    pub(super) fn new(image: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (image.to_str().unwrap(), dir.path().to_str().unwrap());
        run("mount", &["-o", "loop,ro,noload", from, to]);
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.0.path().to_str().unwrap()]);
    }
}
