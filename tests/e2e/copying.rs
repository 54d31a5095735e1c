//! Tests of `fcctl cp` with real guests: one of the default image, and one whose image contains no
//! programs at all.

use crate::host::{Host, Spawned, text, wait_for};
use crate::runtime::register;
use crate::terminal::Person;
use serde_json::json;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

/// A command that prints kind, mode, owner, time, size, number of names, target and path of
/// everything. The size and the number of names of a directory depend on the file system.
const LIST: &str = r"find . -type d -printf 'd %m %U:%G %T@ %P\0' -o -printf '%y %m %U:%G %T@ %s %n %l %P\0' | sort -z";
const SPARSE_BYTES: u64 = 100 << 20;

#[test]
fn copies_to_and_from_guests() {
    let host = Host::start();
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    let bare = dir.path().join("bare");
    fs::create_dir_all(bare.join("data")).unwrap();
    // Commands of this image run as another user. Copies still belong to root.
    let config = json!({"user": "1000:1000", "working_dir": "/srv"});
    register(&host, "bare", &bare, config);
    let args = ["vm", "create", "--name", "bare", "--image", "bare"];
    host.ok(&[&args[..], &["--net", "none"]].concat());
    host.ok(&["start", "bare"]);
    host.boot("box");
    let tree = dir.path().join("tree");
    make_tree(&tree);
    archives_round_trip_through_both_guests(&host, &tree);
    plain_copies_belong_to_their_user(&host, &tree);
    tars_go_both_ways(&host, &tree);
    destinations_follow_rules(&host, dir.path());
    links_and_fifos_of_guest_are_not_followed(&host, dir.path());
    interrupt_leaves_nothing(&host);
    person_sees_progress(&host, dir.path());
    stop_ends_copy(&host);
}

fn make_tree(tree: &Path) {
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("file"), "text\n").unwrap();
    let raw = OsString::from_vec(b"\xff \n'\\n".to_vec());
    fs::write(tree.join("sub").join(raw), "raw").unwrap();
    fs::write(tree.join(OsString::from_vec(vec![0xe9; 250])), "long").unwrap();
    symlink("/etc/passwd", tree.join("link")).unwrap();
    fs::hard_link(tree.join("file"), tree.join("sub/same")).unwrap();
    let sparse = File::create(tree.join("sparse")).unwrap();
    sparse.write_all_at(b"middle", SPARSE_BYTES / 2).unwrap();
    sparse.set_len(SPARSE_BYTES).unwrap();
    fs::set_permissions(tree.join("file"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(tree.join("file"), Some(1234), Some(5678)).unwrap();
    std::os::unix::fs::chown(tree.join("sub"), Some(4_000_000), Some(7)).unwrap();
    let file = File::open(tree.join("file")).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::fsetxattr(&file, "user.note", b"a\0b", flags).unwrap();
}

fn listing(dir: &Path) -> Vec<u8> {
    let out = Command::new("sh")
        .args(["-c", LIST])
        .current_dir(dir)
        .output();
    let out = out.unwrap().stdout;
    assert!(out.len() > 200);
    out
}

fn holes_are_kept(path: &Path) {
    let found = fs::metadata(path).unwrap();
    assert_eq!(found.len(), SPARSE_BYTES);
    assert!(found.blocks() * 512 < 1 << 20, "{}", found.blocks());
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn archives_round_trip_through_both_guests(host: &Host, tree: &Path) {
    host.ok(&["cp", "-a", path(tree), "box:/root/copy"]);
    assert_eq!(
        host.sh(
            "box",
            "cd /root/copy; stat -c '%u:%g %a %h' file sub; du -k sparse | cut -f 1"
        ),
        "1234:5678 640 2\n4000000:7 755 3\n4\n"
    );
    // The second guest has none of the programs that a copy needs.
    host.ok(&["cp", "-a", "box:/root/copy", "bare:/data"]);
    let back = tree.with_file_name("back");
    host.ok(&["cp", "-a", "bare:/data/copy", path(&back)]);
    assert_eq!(
        listing(&back).escape_ascii().to_string(),
        listing(tree).escape_ascii().to_string()
    );
    holes_are_kept(&back.join("sparse"));
    let mut value = [0; 8];
    let read = rustix::fs::getxattr(back.join("file"), "user.note", &mut value[..]);
    assert_eq!(&value[..read.unwrap()], b"a\0b");
    let inode = |name| fs::metadata(back.join(name)).unwrap().ino();
    assert_eq!(inode("file"), inode("sub/same"));
}

fn plain_copies_belong_to_their_user(host: &Host, tree: &Path) {
    let file = tree.join("file");
    host.ok(&["cp", path(tree), "box:/root/plain"]);
    host.ok(&["cp", path(&file), "bare:/data/plain"]);
    host.ok(&["cp", "--user", "games", path(&file), "box:/tmp/theirs"]);
    let script = "stat -c '%u:%g %h' /root/plain/file /root/plain/sub; stat -c %U /tmp/theirs";
    assert_eq!(host.sh("box", script), "0:0 1\n0:0 3\ngames\n");
    let argv = [
        "exec",
        "-u",
        "0",
        "bare",
        "--",
        "stat",
        "-c",
        "%u:%g",
        "/data/plain",
    ];
    assert_eq!(host.ok(&argv), "0:0\n");
    let (status, said) = host.fails(&["cp", "--user", "games", path(&file), "box:/root/no"]);
    assert!(status == 1 && said.contains("Permission denied"), "{said}");
    let (status, said) = host.fails(&["cp", "--user", "ann", path(&file), "box:/tmp/no"]);
    assert!(status == 1 && said.contains("no user ann"), "{said}");
    let back = tree.with_file_name("plain");
    host.ok(&["cp", "box:/root/copy", path(&back)]);
    let found = fs::metadata(back.join("file")).unwrap();
    assert_eq!(
        (found.uid(), found.mode() & 0o777, found.nlink()),
        (0, 0o640, 1)
    );
    holes_are_kept(&back.join("sparse"));
}

fn tars_go_both_ways(host: &Host, tree: &Path) {
    let out = host.fcctl(&["cp", "-a", "box:/root/copy", "-"]);
    assert!(out.status.success(), "{}", text(&out).1);
    host.sh("box", "mkdir /root/new");
    let fed = host.feed(&["cp", "-a", "-", "box:/root/new"], &out.stdout);
    assert!(fed.status.success(), "{}", text(&fed).1);
    let back = tree.with_file_name("piped");
    host.ok(&["cp", "-a", "box:/root/new/copy", path(&back)]);
    assert_eq!(listing(&back), listing(tree));
    // A tar that is cut off changes nothing.
    let half = &out.stdout[..out.stdout.len() / 2];
    let fed = host.feed(&["cp", "-", "box:/tmp"], half);
    assert_eq!(fed.status.code(), Some(4), "{}", text(&fed).1);
    assert_eq!(host.sh("box", "ls -A /tmp"), "theirs\n");
}

fn destinations_follow_rules(host: &Host, dir: &Path) {
    let file = dir.join("one");
    fs::write(&file, "one\n").unwrap();
    host.sh(
        "box",
        "mkdir -p /root/d/one.d; echo old >/root/d/one; ln -s d /root/to-d",
    );
    host.ok(&["cp", path(&file), "box:root/d/one.d"]);
    host.ok(&["cp", path(&file), "box:/root/to-d/"]);
    host.ok(&["cp", "box:/root/d/one", "box:/root/d/two"]);
    host.ok(&["cp", "box:/root/d/.", "box:/root/e"]);
    host.ok(&["cp", "box:/root/d", "box:/root/e"]);
    assert_eq!(
        host.sh(
            "box",
            "cd /root; cat d/one d/one.d/one d/two; find e | sort"
        ),
        "one\none\none\ne\ne/d\ne/d/one\ne/d/one.d\ne/d/one.d/one\ne/d/two\ne/one\ne/one.d\ne/one.d/one\ne/two\n"
    );
    for (args, status, word) in [
        (
            ["cp", "box:/root/none", "."],
            3,
            "no such file or directory",
        ),
        (["cp", "box:/root/d/one/", "."], 2, "not a directory"),
        (
            ["cp", path(&file), "box:/root/none/x"],
            3,
            "mkdir -p /root/none/",
        ),
        (["cp", path(&file), "box:/root/new/"], 0, ""),
        (
            ["cp", path(&file), "box:/root/newer/"],
            3,
            "no such directory",
        ),
        (
            ["cp", path(dir), "box:/root/d/one"],
            4,
            "is not a directory",
        ),
        (["cp", "box:/root/d", "box:/root/d/one.d"], 2, "into itself"),
        (["cp", path(&file), "nope:/x"], 3, "fcctl ps"),
    ] {
        let out = host.fcctl(&args);
        let said = text(&out).1;
        assert_eq!(out.status.code(), Some(status), "{args:?}: {said}");
        assert!(said.contains(word), "{args:?}: {said}");
    }
}

fn links_and_fifos_of_guest_are_not_followed(host: &Host, dir: &Path) {
    let out = dir.join("out");
    fs::create_dir(&out).unwrap();
    host.sh(
        "box",
        "mkdir /root/x; cd /root/x; ln -s /etc/passwd l; mkfifo f; mknod n c 1 3; echo k >k",
    );
    let copied = host.fcctl(&["cp", "box:/root/x", path(&out)]);
    let said = text(&copied).1;
    assert!(copied.status.success(), "{said}");
    assert!(
        said.contains("x/f: it is a FIFO") && said.contains("x/n: it is a device"),
        "{said}"
    );
    assert_eq!(
        fs::read_link(out.join("x/l")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert_eq!(fs::read_dir(out.join("x")).unwrap().count(), 2);
    // An existing link in the destination is not followed.
    fs::remove_file(out.join("x/k")).unwrap();
    symlink(dir.join("victim"), out.join("x/k")).unwrap();
    host.ok(&["cp", "box:/root/x/k", path(&out.join("x"))]);
    assert!(!dir.join("victim").exists());
    assert_eq!(fs::read(out.join("x/k")).unwrap(), b"k\n");
}

/// Starts a copy from stdin, and waits until its first file has arrived in the guest.
fn begin(host: &Host) -> Spawned {
    let mut command = host.command(&["cp", "-", "box:/root/new"]);
    let mut copy = Spawned::start(command.stdin(Stdio::piped()));
    let mut header = tar::Header::new_gnu();
    header.set_path("half").unwrap();
    header.set_size(1 << 30);
    header.set_mode(0o644);
    header.set_cksum();
    let stdin = copy.child.stdin.as_mut().unwrap();
    stdin.write_all(header.as_bytes()).unwrap();
    stdin.write_all(&[7; 1 << 20]).unwrap();
    wait_for("the first bytes in the guest", || {
        let script = "find /root/new -name half | wc -l";
        (host.sh("box", script) == "1\n").then_some(())
    });
    copy
}

fn interrupt_leaves_nothing(host: &Host) {
    let before = host.sh("box", "ls -A /root/new");
    let mut copy = begin(host);
    copy.signal("INT");
    assert_eq!(
        (copy.end().0, copy.stderr()),
        (Some(130), "fcctl: interrupted\n".to_owned())
    );
    wait_for("the end of the command in the guest", || {
        (host.sh("box", "ls -A /root/new") == before).then_some(())
    });
}

/// A person at a terminal sees a bar, and ends the copy with Ctrl-C.
fn person_sees_progress(host: &Host, dir: &Path) {
    let big = dir.join("big");
    fs::write(&big, vec![7; 256 << 20]).unwrap();
    let mut person = Person::sit_down(24, 100);
    let mut child = person.fcctl(host, &["cp", path(&big), "box:/root/big"]);
    person.sees("copy to box");
    person.sees("/256.00 MiB");
    person.type_in("\x03");
    person.sees("fcctl: interrupted\r\n");
    let status = wait_for("the end of the copy", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(130));
    assert_eq!(
        host.sh(
            "box",
            "ls /root/big 2>&1 | wc -l; ls /root | grep -c big || true"
        ),
        "1\n0\n"
    );
    let mut child = person.fcctl(host, &["cp", "-q", "box:/root/d/one", path(dir)]);
    let status = wait_for("the end of the copy", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    assert_eq!(person.shown(), "", "a quiet copy prints nothing");
}

fn stop_ends_copy(host: &Host) {
    let mut copy = begin(host);
    let mut stop = host.spawn(&["stop", "box"]);
    let (status, took) = copy.end();
    assert!(
        status == Some(130) && took.as_secs() < 2,
        "{status:?} {took:?}"
    );
    assert!(
        copy.stderr().contains("the VM was stopped"),
        "{}",
        copy.stderr()
    );
    assert_eq!(stop.end().0, Some(0));
    let (status, said) = host.fails(&["cp", "box:/root/new", "."]);
    assert!(status == 1 && said.contains("fcctl start box"), "{said}");
}
