//! Runs whole command lines. The guest's commands run on this host, so a path in a VM is a path
//! below a temporary directory.

mod failures;

use super::super::tests::{Ran, Start, fcctl_from, file_with};
use crate::api::exec::CommandWords;
use crate::client::fake::{Fake, Request};
use crate::error::{Error, Kind};
use expect_test::Expect;
use serde_json::json;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Runs the command of an `exec.start` call on this host.
#[allow(clippy::disallowed_methods)] // The tests play the guest.
fn run_here(mut r: Request) {
    let names: Vec<String> = serde_json::from_value(r.params["streams"].clone()).unwrap();
    let mut argv: Vec<OsString> = serde_json::from_value::<Vec<String>>(r.params["argv"].clone())
        .unwrap()
        .into_iter()
        .map(OsString::from)
        .collect();
    let (mut stdin, mut stdout, mut stderr) = (Stdio::null(), Stdio::null(), Stdio::null());
    for (name, fd) in names.iter().zip(std::mem::take(&mut r.fds)) {
        match name.as_str() {
            "stdin" => stdin = fd.into(),
            "stdout" => stdout = fd.into(),
            "stderr" => stderr = fd.into(),
            _ => {
                let mut bytes = Vec::new();
                File::from(fd).read_to_end(&mut bytes).unwrap();
                let words = CommandWords::decode(&bytes).unwrap();
                argv = words.argv.into_iter().map(OsString::from_vec).collect();
            }
        }
    }
    // The fake daemon runs as root.
    if let Some(user) = r.params["user"].as_str().filter(|user| *user != "0") {
        let ids = [format!("--reuid={user}"), format!("--regid={user}")];
        let before = ["setpriv", &ids[0], &ids[1], "--clear-groups"];
        argv.splice(0..0, before.map(OsString::from));
    }
    let child = Command::new(&argv[0])
        .args(&argv[1..])
        .current_dir("/")
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr)
        .status();
    let status = child.unwrap().code().unwrap_or(255);
    r.result(json!({"exit": {"status": status}}));
}

/// Starts a daemon with the VMs `web` and `db`, which use this host's files. The VM `off` is not
/// running.
fn daemon() -> Fake {
    Fake::start(|r: Request| {
        let vm = r.params["vm"].as_str().unwrap_or_default().to_owned();
        match (r.method.as_str(), vm.as_str()) {
            ("exec.start", "web" | "db") => run_here(r),
            ("exec.start", "off") => r.fault(
                Error::new(Kind::WrongState, "VM off is stopped").hint("start it: fcctl start off"),
            ),
            ("vm.show", _) => {
                let vm = super::super::tests::vm(&vm, crate::api::vm::VmState::Running);
                r.result(json!({"vm": vm}));
            }
            _ => r.fault(Error::new(Kind::VmNotFound, format!("no VM {vm}")).hint("fcctl ps -a")),
        }
    })
}

/// A temporary directory with the directories `host` and `guest`.
struct Site {
    fake: Fake,
    dir: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("host")).unwrap();
        fs::create_dir(dir.path().join("guest")).unwrap();
        Self {
            fake: daemon(),
            dir,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Replaces `web:x` and `h:x` with paths below the guest's and the host's directory.
    fn word(&self, word: &str) -> String {
        let dir = self.dir.path().display();
        match word.split_once(':') {
            Some(("h", path)) => format!("{dir}/host/{path}"),
            Some((vm @ ("web" | "db" | "off"), path)) => format!("{vm}:{dir}/guest/{path}"),
            _ => word.to_owned(),
        }
    }

    fn start(&self, start: Start, words: &[&str]) -> Ran {
        let words: Vec<String> = words.iter().map(|word| self.word(word)).collect();
        let mut args = vec!["cp"];
        args.extend(words.iter().map(String::as_str));
        let mut ran = fcctl_from(&self.fake, start, &args);
        ran.err = ran.err.replace(self.dir.path().to_str().unwrap(), "DIR");
        ran
    }

    fn cp(&self, words: &str) -> Ran {
        let words: Vec<&str> = words.split(' ').collect();
        self.start(Start::default(), &words)
    }

    #[track_caller]
    fn ok(&self, words: &str) {
        let ran = self.cp(words);
        assert_eq!((ran.status, ran.err.as_str()), (0, ""), "cp {words}");
    }

    /// Runs a command line and compares what it prints and its status.
    #[track_caller]
    fn check(&self, words: &str, expected: Expect) {
        let ran = self.cp(words);
        let out = String::from_utf8_lossy(&ran.out);
        expected.assert_eq(&format!("{out}{}status {}\n", ran.err, ran.status));
    }

    /// Creates a tree with everything that a copy can keep.
    fn tree(&self, name: &str) {
        let top = self.path(name);
        fs::create_dir_all(top.join("sub/empty")).unwrap();
        fs::write(top.join("file"), "text\n").unwrap();
        let raw = OsString::from_vec(b"\xff \n'\\n-".to_vec());
        fs::write(top.join("sub").join(raw), "raw").unwrap();
        fs::write(top.join(OsString::from_vec(vec![b'n'; 200])), "long").unwrap();
        symlink("/nowhere/at/all", top.join("link")).unwrap();
        fs::hard_link(top.join("file"), top.join("sub/same")).unwrap();
        let sparse = File::create(top.join("sparse")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 40 << 20).unwrap();
        sparse.set_len(100 << 20).unwrap();
        set_mode(&top.join("file"), 0o640);
        set_mode(&top.join("sub"), 0o2750);
        let file = File::open(top.join("file")).unwrap();
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::fsetxattr(&file, "user.note", b"a\0b\n", flags).unwrap();
        let times = rustix::fs::Timestamps {
            last_access: time(1, 0),
            last_modification: time(1_700_000_000, 123_456_789),
        };
        rustix::fs::futimens(&file, &times).unwrap();
    }
}

fn time(tv_sec: i64, tv_nsec: i64) -> rustix::fs::Timespec {
    rustix::fs::Timespec { tv_sec, tv_nsec }
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Describes everything below `top`: name, kind, mode, and size, target or content.
fn listing(top: &Path) -> Vec<String> {
    let (mut found, mut pending) = (Vec::new(), vec![top.to_owned()]);
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(top).unwrap().as_os_str().to_owned();
            let what = if meta.is_dir() {
                pending.push(path);
                format!("dir {:o}", meta.mode() & 0o777)
            } else if meta.is_symlink() {
                format!("link {}", fs::read_link(&path).unwrap().display())
            } else if !meta.is_file() {
                "neither".to_owned()
            } else if meta.len() > 1 << 20 {
                assert!(meta.blocks() < 2048, "{path:?} has no holes");
                format!("sparse {} {}", meta.len(), meta.mtime())
            } else {
                let content = fs::read(&path).unwrap();
                let (mode, time) = (meta.mode() & 0o7777, meta.mtime_nsec());
                format!("file {mode:o} {time} {}", content.escape_ascii())
            };
            found.push(format!(
                "{}: {what}",
                name.into_encoded_bytes().escape_ascii()
            ));
        }
    }
    found.sort();
    found
}

#[test]
fn tree_comes_back_as_it_was() {
    let site = Site::new();
    site.tree("host/tree");
    for flags in ["", "-a "] {
        site.ok(&format!("{flags}h:tree web:copy"));
        site.ok(&format!("{flags}web:copy db:other"));
        site.ok(&format!("{flags}db:other h:back"));
        let all = ["host/tree", "guest/copy", "guest/other", "host/back"];
        let all = all.map(|name| listing(&site.path(name)));
        assert!(all[0].len() > 7, "{:?}", all[0]);
        for copy in &all[1..] {
            assert_eq!(*copy, all[0], "{flags}");
        }
        let same = |name: &str| {
            let inode = |name: String| fs::metadata(site.path(&name)).unwrap().ino();
            inode(format!("{name}/file")) == inode(format!("{name}/sub/same"))
        };
        let note = |name: &str| {
            let mut value = [0; 10];
            let path = site.path(&format!("{name}/file"));
            let read = rustix::fs::getxattr(path, "user.note", &mut value[..]);
            read.map(|n| value[..n].to_vec()).ok()
        };
        let is_archive = !flags.is_empty();
        for name in ["guest/copy", "guest/other", "host/back"] {
            assert_eq!(same(name), is_archive, "{name}");
            assert_eq!(note(name).is_some(), is_archive, "{name}");
        }
        let set_id = fs::metadata(site.path("guest/copy/sub")).unwrap().mode() & 0o2000;
        assert_eq!(set_id != 0, is_archive);
        for name in ["guest/copy", "guest/other", "host/back"] {
            fs::remove_dir_all(site.path(name)).unwrap();
        }
    }
}

#[test]
fn owners_are_kept_with_archive_only() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: only root can make files of another owner");
        return;
    }
    let site = Site::new();
    fs::create_dir(site.path("host/d")).unwrap();
    for (name, id) in [
        ("host/d", 1000),
        ("host/d/small", 1234),
        ("host/d/large", 3_000_000),
    ] {
        if !site.path(name).exists() {
            fs::write(site.path(name), name).unwrap();
        }
        std::os::unix::fs::chown(site.path(name), Some(id), Some(id + 1)).unwrap();
    }
    let owners = |top: &str| {
        ["", "/small", "/large"].map(|name| {
            let found = fs::metadata(site.path(&format!("{top}{name}"))).unwrap();
            (found.uid(), found.gid())
        })
    };
    let kept = [(1000, 1001), (1234, 1235), (3_000_000, 3_000_001)];
    site.ok("-a h:d web:a");
    site.ok("-a web:a db:b");
    site.ok("-a db:b h:c");
    for top in ["guest/a", "guest/b", "host/c"] {
        assert_eq!(owners(top), kept, "{top}");
    }
    site.ok("h:d web:e");
    site.ok("web:a h:f");
    for top in ["guest/e", "host/f"] {
        assert_eq!(owners(top), [(0, 0); 3], "{top}");
    }
}

/// Runs `body` in a thread of another user.
#[allow(unsafe_code)]
fn as_uid(uid: u32, body: impl FnOnce() + Send) {
    let alone = || {
        // SAFETY: the raw system calls change only this thread. The C library's functions would
        // change all threads.
        let done = unsafe {
            libc::syscall(libc::SYS_setgroups, 0, 0)
                | libc::syscall(libc::SYS_setresgid, uid, uid, uid)
                | libc::syscall(libc::SYS_setresuid, uid, uid, uid)
        };
        assert_eq!(done, 0, "become uid {uid}");
        body();
    };
    std::thread::scope(|scope| scope.spawn(alone).join()).unwrap();
}

/// Ordinary users, of the host and of the guest, own what they copy, as with `cp -a`.
#[test]
fn ordinary_users_own_their_copies_with_archive() {
    const USER: u32 = 54_321;
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: only root can make files of another owner");
        return;
    }
    let site = Site::new();
    fs::create_dir_all(site.path("guest/d")).unwrap();
    fs::write(site.path("guest/d/f"), "f").unwrap();
    std::os::unix::fs::chown(site.path("guest/d/f"), Some(1234), Some(1234)).unwrap();
    fs::set_permissions(site.path("guest/d/f"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::set_permissions(site.path("host"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(site.path("guest"), fs::Permissions::from_mode(0o777)).unwrap();
    for open in [
        site.path(""),
        site.fake.dir().to_owned(),
        site.fake.socket(),
    ] {
        fs::set_permissions(open, fs::Permissions::from_mode(0o777)).unwrap();
    }
    as_uid(USER, || {
        site.ok("-a web:d h:mine");
        site.ok("-a --user 54322 h:mine web:theirs");
    });
    for (name, uid) in [("host/mine", USER), ("guest/theirs", USER + 1)] {
        for path in [name.to_owned(), format!("{name}/f")] {
            let found = fs::metadata(site.path(&path)).unwrap();
            assert_eq!((found.uid(), found.gid()), (uid, uid), "{path}");
        }
        let mode = fs::metadata(site.path(&format!("{name}/f")))
            .unwrap()
            .mode();
        assert_eq!(mode & 0o777, 0o640, "{name}");
    }
}

/// Runs each line with `cp -r` and with `fcctl cp`, in both directions, and compares the result.
#[test]
#[allow(clippy::disallowed_methods)] // The tests compare with the system's cp.
fn destination_follows_rules_of_cp() {
    let setup = |dir: &Path| {
        fs::create_dir_all(dir.join("from/d/sub")).unwrap();
        fs::create_dir_all(dir.join("to/there/d/sub")).unwrap();
        fs::create_dir_all(dir.join("to/blocked/f")).unwrap();
        fs::write(dir.join("from/f"), "new").unwrap();
        fs::write(dir.join("from/d/sub/x"), "newx").unwrap();
        symlink("nowhere", dir.join("from/l")).unwrap();
        symlink("d", dir.join("from/ld")).unwrap();
        symlink("there", dir.join("to/link")).unwrap();
        fs::write(dir.join("to/f"), "old").unwrap();
        fs::write(dir.join("to/there/d/sub/old"), "old").unwrap();
        fs::write(dir.join("to/there/d/sub/x"), "oldx").unwrap();
        fs::write(dir.join("to/blocked/d"), "old").unwrap();
    };
    let names = |dir: &Path| -> Vec<String> {
        // Without -a, the modes and times of files differ, so only their content is compared.
        let cut = |line: String| match line.find(": file ") {
            Some(at) => format!("{}{}", &line[..at], line.rsplit(' ').next().unwrap()),
            None => line,
        };
        listing(&dir.join("to")).into_iter().map(cut).collect()
    };
    for (from, to) in [
        ("f", "new"),
        ("f", "new/"),
        ("f", "f"),
        ("f", "f/"),
        ("f", "f/x"),
        ("f", "there"),
        ("f", "there/"),
        ("f", "there/."),
        ("f", "link"),
        ("f", "link/"),
        ("f", "none/new"),
        ("f", "blocked"),
        ("f/", "new"),
        ("d", "new"),
        ("d", "new/"),
        ("d/", "new"),
        ("d", "there"),
        ("d/", "there"),
        ("d/.", "there"),
        ("d/.", "new"),
        ("d/sub/..", "there"),
        ("d", "link"),
        ("d", "f"),
        ("d", "blocked"),
        ("d", "none/new"),
        ("l", "new"),
        ("l", "there"),
        ("ld", "new"),
        ("ld/", "new"),
        ("f d", "there"),
        ("f d", "new"),
        ("f d", "f"),
        ("f none", "there"),
        ("none", "new"),
    ] {
        let expected = tempfile::tempdir().unwrap();
        setup(expected.path());
        let mut cp = Command::new("cp");
        cp.arg("-r")
            .stderr(Stdio::null())
            .current_dir(expected.path());
        cp.args(from.split(' ').map(|from| format!("from/{from}")));
        let is_ok = cp.arg(format!("to/{to}")).status().unwrap().success();
        for is_into in [true, false] {
            let site = Site::new();
            setup(&site.path("host"));
            setup(&site.path("guest"));
            let (here, there) = if is_into { ("h", "web") } else { ("web", "h") };
            let from: Vec<_> = from
                .split(' ')
                .map(|f| format!("{here}:from/{f}"))
                .collect();
            let line = format!("{} {there}:to/{to}", from.join(" "));
            let ran = site.cp(&line);
            assert_eq!(ran.status == 0, is_ok, "cp {line}: {}", ran.err);
            let side = if is_into { "guest" } else { "host" };
            // With several sources, fcctl copies nothing into a VM if one of them does not exist,
            // but cp copies the others. Compare only where both do the same.
            if is_ok || from.len() == 1 {
                assert_eq!(names(&site.path(side)), names(expected.path()), "cp {line}");
            }
        }
    }
}

#[test]
fn tar_goes_both_ways() {
    let site = Site::new();
    site.tree("guest/tree");
    let start = |stdin: &[u8]| {
        let stdin = file_with(stdin);
        Start {
            stdin,
            ..Start::default()
        }
    };
    for (path, copy) in [("web:tree", "host/tree"), ("web:tree/.", "host")] {
        let ran = site.cp(&format!("{path} -"));
        assert_eq!((ran.status, ran.err.as_str()), (0, ""));
        fs::create_dir_all(site.path("guest/new")).unwrap();
        let into = site.start(start(&ran.out), &["-", "web:new"]);
        assert_eq!((into.status, into.err.as_str()), (0, ""));
        let copy = copy.replace("host", "guest/new");
        assert_eq!(
            listing(&site.path(&copy)),
            listing(&site.path("guest/tree"))
        );
        fs::remove_dir_all(site.path("guest/new")).unwrap();
    }
    let tar = site.cp("web:tree -").out;
    // The destination of a tar must be a directory, and a truncated tar changes nothing.
    fs::create_dir(site.path("guest/here")).unwrap();
    for (input, to, status, text) in [
        (
            &tar[..],
            "web:none",
            3,
            "guest/none: no such file or directory",
        ),
        (
            &tar[..],
            "web:tree/file",
            2,
            "guest/tree/file: not a directory",
        ),
        (&tar[..tar.len() / 2], "web:here", 4, "end-of-archive mark"),
        (&tar[..1024], "web:here", 4, "end-of-archive mark"),
        (b"", "web:here", 4, "after 0 entries"),
        (&[1; 4096], "web:here", 2, "this is not a tar"),
    ] {
        let ran = site.start(start(input), &["-", to]);
        assert_eq!(ran.status, status, "{}", ran.err);
        assert!(ran.err.contains(text), "{}", ran.err);
        assert_eq!(listing(&site.path("guest/here")), [""; 0], "{to}");
    }
    assert!(site.path("guest/tree").exists());
}
