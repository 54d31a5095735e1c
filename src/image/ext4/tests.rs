//! Tests with file systems that mke2fs and debugfs make.

use super::*;
use crate::host::Command;
use crate::locks::Cancel;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

const BYTES_MAX: u64 = 64 << 20;

fn run(program: &str, args: &[&str]) {
    let command = Command::new(program).args(args);
    let cancel = Cancel::try_new().unwrap();
    let out = crate::host::command::run_any_status(&command, &cancel, &mut |_| {}).unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status, 0, "{program} {args:?}: {said}");
}

/// Makes a file system from a tree.
fn make(dir: &Path, tree: &Path, options: &[&str]) -> File {
    let path = dir.join("disk");
    let paths = [tree, &path].map(|path| path.to_str().unwrap());
    let fixed = ["-q", "-F", "-E", "root_owner=7:8", "-d", paths[0]];
    run(
        "mke2fs",
        &[&fixed[..], options, &[paths[1], "16M"]].concat(),
    );
    File::options().read(true).write(true).open(path).unwrap()
}

/// Makes a file system with one file.
pub(crate) fn small() -> (tempfile::TempDir, File) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("file"), "content").unwrap();
    let disk = make(dir.path(), &tree, &["-t", "ext4"]);
    (dir, disk)
}

/// Returns the entries of an archive by their path, each as a text and its content.
fn entries(tar: &[u8]) -> BTreeMap<String, (String, Vec<u8>)> {
    let mut archive = tar::Archive::new(tar);
    let mut found = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        let header = entry.header().clone();
        let link = entry.link_name().unwrap();
        let link = link.map_or(String::new(), |to| format!(" -> {}", to.display()));
        let device = match header.entry_type() {
            tar::EntryType::Char | tar::EntryType::Block => format!(
                " {}:{}",
                header.device_major().unwrap().unwrap(),
                header.device_minor().unwrap().unwrap()
            ),
            _ => String::new(),
        };
        let mut extensions = Vec::new();
        for extension in entry.pax_extensions().unwrap().into_iter().flatten() {
            let extension = extension.unwrap();
            let (key, value) = (extension.key().unwrap(), extension.value_bytes());
            if key != "mtime" {
                extensions.push(format!(" {key}={}", String::from_utf8_lossy(value)));
            }
        }
        let about = format!(
            "{:?} {:o} {}:{}{link}{device}{}",
            header.entry_type(),
            header.mode().unwrap(),
            header.uid().unwrap(),
            header.gid().unwrap(),
            extensions.concat()
        );
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        found.insert(path, (about, content));
    }
    found
}

fn tar_of(disk: &File) -> Result<Vec<u8>, Error> {
    let mut tar = Vec::new();
    write_tar(disk, &mut tar, BYTES_MAX, &|_| {}).map(|()| tar)
}

/// Makes a tree with a file of each kind that needs no privileges.
fn make_tree(tree: &Path) -> Vec<u8> {
    std::fs::create_dir_all(tree.join("a/b")).unwrap();
    let big: Vec<u8> = (0..600_000u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(tree.join("a/big"), &big).unwrap();
    let sparse = File::create(tree.join("sparse")).unwrap();
    sparse.write_at(b"begin", 0).unwrap();
    sparse.write_at(b"end", 300_000).unwrap();
    std::fs::write(tree.join("empty"), "").unwrap();
    let program = tree.join("program");
    std::fs::write(&program, "#!").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o4755)).unwrap();
    std::fs::hard_link(&program, tree.join("a/same")).unwrap();
    symlink("a/b", tree.join("short")).unwrap();
    symlink("x".repeat(200), tree.join("long")).unwrap();
    nix::unistd::mkfifo(&tree.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for n in 0..500 {
        std::fs::write(tree.join(format!("a/b/{n}-{}", "n".repeat(100))), "").unwrap();
    }
    big
}

#[track_caller]
fn check(options: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    let big = make_tree(&tree);
    let disk = make(dir.path(), &tree, options);
    let path = dir.path().join("disk");
    for request in [
        "mknod null c 1 3",
        "mknod wide b 259 60000",
        "set_inode_field program uid 100000",
        "set_inode_field program gid 3000000",
        "ea_set program user.key value",
        "ea_set program security.capability caps",
    ] {
        run("debugfs", &["-w", "-R", request, path.to_str().unwrap()]);
    }
    let found = entries(&tar_of(&disk).unwrap());
    let about = |path: &str| found.get(path).map_or("none", |(about, _)| about);
    let me = format!("{}:{}", nix::unistd::geteuid(), nix::unistd::getegid());
    assert_eq!(about("./"), "Directory 755 7:8");
    assert_eq!(about("a/b/"), format!("Directory 755 {me}"));
    assert_eq!(about("short"), format!("Symlink 777 {me} -> a/b"));
    assert_eq!(
        about("long"),
        format!("Symlink 777 {me} -> {}", "x".repeat(200))
    );
    assert_eq!(about("pipe"), format!("Fifo 700 {me}"));
    assert!(about("null").starts_with("Char") && about("null").ends_with(" 1:3"));
    assert!(about("wide").ends_with(" 259:60000"), "{}", about("wide"));
    // The first name in the archive has the content, and the second is a link to it.
    assert_eq!(
        about("a/same"),
        "Regular 4755 100000:3000000 gid=3000000 \
         SCHILY.xattr.security.capability=caps SCHILY.xattr.user.key=value"
    );
    assert!(about("program").starts_with("Link") && about("program").ends_with(" -> a/same"));
    assert!(found["a/big"].1 == big);
    let mut sparse = vec![0; 300_003];
    sparse[..5].copy_from_slice(b"begin");
    sparse[300_000..].copy_from_slice(b"end");
    assert!(found["sparse"].1 == sparse);
    let in_b = found.keys().filter(|path| path.starts_with("a/b/"));
    assert_eq!(in_b.count(), 501);
    assert!(!found.contains_key("lost+found/"));
}

#[test]
fn tree_is_read_from_ext4_with_extents() {
    check(&["-t", "ext4", "-b", "4096"]);
    check(&["-t", "ext4", "-b", "1024", "-O", "^64bit,^metadata_csum"]);
}

#[test]
fn tree_is_read_from_file_systems_with_block_maps() {
    check(&["-t", "ext3", "-b", "1024", "-I", "256"]);
    check(&["-t", "ext2", "-b", "2048", "-I", "128", "-O", "^dir_index"]);
}

#[test]
fn names_that_delete_and_unknown_features_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join(".wh.file"), "").unwrap();
    let e = tar_of(&make(dir.path(), &tree, &["-t", "ext4"])).unwrap_err();
    assert!(
        e.kind() == Kind::Unsupported && e.to_string().contains(".wh.file"),
        "{e}"
    );
    let mounted = make(dir.path(), &tree, &["-t", "ext4"]);
    mounted.write_all_at(&[0x4], 1024 + 0x60).unwrap();
    let e = tar_of(&mounted).unwrap_err();
    assert!(e.to_string().contains("was not unmounted"), "{e}");
    let inline = make(dir.path(), &tree, &["-t", "ext4", "-O", "inline_data"]);
    let e = tar_of(&inline).unwrap_err();
    assert!(e.to_string().contains("has the features 0x8000"), "{e}");
}

#[test]
fn content_beyond_the_limit_is_refused() {
    let (_dir, disk) = small();
    let e = write_tar(&disk, &mut Vec::new(), 3, &|_| {}).unwrap_err();
    assert_eq!(e.kind(), Kind::Exhausted);
}

/// A file system that is damaged anywhere causes an error or an archive, but no panic and no loop.
#[test]
fn damaged_file_system_ends() {
    struct Bounded(u64);
    impl Write for Bounded {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len() as u64;
            assert!(self.0 < 4 * BYTES_MAX, "the archive does not end");
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree);
    let disk = make(dir.path(), &tree, &["-t", "ext4", "-b", "1024"]);
    let mut seed = 20_261_130u64;
    let mut random = |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for _ in 0..300 {
        let mut before = Vec::new();
        for _ in 0..4 {
            // Most of the metadata is at the beginning.
            let at = if random(2) == 0 {
                random(400 << 10)
            } else {
                random(16 << 20)
            };
            let mut byte = [0];
            disk.read_exact_at(&mut byte, at).unwrap();
            before.push((at, byte));
            disk.write_all_at(&[random(256) as u8], at).unwrap();
        }
        let _ = write_tar(&disk, &mut Bounded(0), BYTES_MAX, &|_| {});
        for (at, byte) in before.into_iter().rev() {
            disk.write_all_at(&byte, at).unwrap();
        }
    }
    assert!(tar_of(&disk).is_ok());
}
