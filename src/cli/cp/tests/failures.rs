//! Tests command lines that fail, guests that misbehave, and copies that are cut off.

use super::*;
use expect_test::expect;
use std::os::fd::OwnedFd;

#[test]
fn failures_name_the_path() {
    let site = Site::new();
    fs::write(site.path("host/f"), "f").unwrap();
    fs::write(site.path("guest/f"), "f").unwrap();
    fs::create_dir(site.path("guest/d")).unwrap();
    fs::create_dir(site.path("host/d")).unwrap();
    nix::unistd::mkfifo(&site.path("guest/d/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let check = |words: &str, expected: Expect| site.check(words, expected);
    check(
        "h:none web:x",
        expect![[r#"
        fcctl: DIR/host/none: no such file or directory
        status 3
    "#]],
    );
    check(
        "h:f web:none/x",
        expect![[r#"
        fcctl: web:DIR/guest/none/: no such directory
        hint: create it: fcctl exec web -- mkdir -p DIR/guest/none/
        status 3
    "#]],
    );
    check(
        "h:f web:f/",
        expect![[r#"
        fcctl: web:DIR/guest/f/: not a directory
        status 2
    "#]],
    );
    check(
        "h:d web:f",
        expect![[r#"
        fcctl: web:DIR/guest/f: it exists and is not a directory
        status 4
    "#]],
    );
    check(
        "h:d/none h:f web:d",
        expect![[r#"
        fcctl: DIR/host/d/none: no such file or directory
        status 3
    "#]],
    );
    check(
        "web:none h:x",
        expect![[r#"
        fcctl: web:DIR/guest/none: no such file or directory
        status 3
    "#]],
    );
    check(
        "web:f/ h:x",
        expect![[r#"
        fcctl: web:DIR/guest/f/: not a directory
        status 2
    "#]],
    );
    check(
        "web:d/fifo h:x",
        expect![[r#"
        fcctl: web:DIR/guest/d/fifo: it is a device, a FIFO or a socket, which cannot be copied
        status 2
    "#]],
    );
    check(
        "web:d h:f",
        expect![[r#"
        fcctl: DIR/host/f: it exists and is not a directory
        status 4
    "#]],
    );
    check(
        "web:f h:none/x",
        expect![[r#"
        fcctl: DIR/host/none: no such directory
        hint: create it: mkdir -p DIR/host/none
        status 3
    "#]],
    );
    check(
        "web:f web:none h:f",
        expect![[r#"
        fcctl: DIR/host/f: not a directory
        status 2
    "#]],
    );
    check(
        "web:none web:f h:d",
        expect![[r#"
        fcctl: web:DIR/guest/none: no such file or directory
        status 3
    "#]],
    );
    assert!(site.path("host/d/f").exists(), "the other source is copied");
    check(
        "web:d h:d",
        expect![[r#"
        fcctl: warning: skipped DIR/host/d/d/fifo: it is a FIFO
        status 0
    "#]],
    );
    check(
        "web:d web:d/sub",
        expect![[r#"
        fcctl: web:DIR/guest/d/: a directory cannot be copied into itself
        status 2
    "#]],
    );
    check(
        "web:f db:none/x",
        expect![[r#"
        fcctl: db:DIR/guest/none/: no such directory
        hint: create it: fcctl exec db -- mkdir -p DIR/guest/none/
        status 3
    "#]],
    );
    check(
        "web:none db:x",
        expect![[r#"
        fcctl: web:DIR/guest/none: no such file or directory
        status 3
    "#]],
    );
    check(
        "h:f off:x",
        expect![[r#"
        fcctl: VM off is stopped
        hint: start it: fcctl start off
        status 1
    "#]],
    );
    check(
        "off:f h:x",
        expect![[r#"
        fcctl: VM off is stopped
        hint: start it: fcctl start off
        status 1
    "#]],
    );
    check(
        "nope:/f h:x",
        expect![[r#"
        fcctl: no VM nope
        hint: fcctl ps -a
        status 3
    "#]],
    );
    let left = listing(&site.path("guest"));
    assert!(left.iter().all(|line| !line.contains(".fcctl")), "{left:?}");
}

#[test]
fn habits_of_cp_scp_and_docker_are_supported_or_explained() {
    let site = Site::new();
    fs::write(site.path("host/f"), "f").unwrap();
    let check = |words: &str, expected: Expect| site.check(words, expected);
    check(
        "h:f",
        expect![[r#"
        fcctl: cp needs a source and a destination
        hint: into a VM: fcctl cp FILE VM:DIR
        hint: out of a VM: fcctl cp VM:FILE DIR
        status 2
    "#]],
    );
    check(
        "h:f h:g",
        expect![[r#"
        fcctl: neither the source nor the destination is in a VM
        hint: name a path in a VM as VM:PATH, such as fcctl cp FILE web:/root/
        status 2
    "#]],
    );
    // Users of cp, scp and docker type these options.
    for words in [
        "-r h:f web:g",
        "-R h:f web:g",
        "-L h:f web:g",
        "-q h:f web:g",
        "-aq h:f web:g",
    ] {
        site.ok(words);
    }
    let ran = site.cp("--json h:f web:g");
    assert_eq!(
        String::from_utf8(ran.out).unwrap(),
        "{\n  \"entries\": 1,\n  \"bytes\": 1\n}\n"
    );
    for (words, hint) in [
        (
            &["scp", "a", "web:b"][..],
            "hint: into a VM: fcctl cp FILE VM:DIR\n",
        ),
        (
            &["copy", "a", "web:b"][..],
            "hint: into a VM: fcctl cp FILE VM:DIR\n",
        ),
        (
            &["vm", "copy", "a", "web:b"][..],
            "hint: out of a VM: fcctl cp VM:FILE DIR\n",
        ),
    ] {
        let ran = fcctl_from(&site.fake, Start::default(), words);
        assert_eq!(ran.status, 2);
        assert!(ran.err.contains(hint), "{words:?}: {}", ran.err);
    }
    let bare = fcctl_from(&site.fake, Start::default(), &["cp", "f", "web:"]);
    let text = "fcctl: \"web:\" lacks the path in the VM\nhint: such as web:/root/\n";
    assert_eq!((bare.status, bare.err.as_str()), (2, text));
    let long = fcctl_from(&site.fake, Start::default(), &["vm", "cp", "--help"]);
    let short = fcctl_from(&site.fake, Start::default(), &["cp", "--help"]);
    assert_eq!((short.status, &short.out), (0, &long.out));
}

/// Starts a daemon whose guest answers every command with these bytes and this exit status.
fn hostile(bytes: Vec<u8>, status: u8) -> Fake {
    Fake::start(move |mut r: Request| {
        use std::io::Write;
        let names: Vec<String> = serde_json::from_value(r.params["streams"].clone()).unwrap();
        for (name, fd) in names.iter().zip(std::mem::take(&mut r.fds)) {
            if name == "stdout" {
                // The client may close its end before it has read everything.
                let _ = File::from(fd).write_all(&bytes);
            } else if name == "stderr" {
                let _ = File::from(fd).write_all(b"\x1b[2Jcleared\n");
            }
        }
        r.result(json!({"exit": {"status": status}}));
    })
}

#[test]
fn hostile_guest_writes_nothing_outside_destination() {
    let line = b"fcd-copy 1 dir \n";
    let entry = |name: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_size(4);
        header.set_mode(0o644);
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(b"evil");
        bytes.resize(1024, 0);
        bytes
    };
    let end = [0; 1024];
    for (sent, status, text) in [
        ([&line[..], &entry("../x"), &end].concat(), 2, "../x"),
        ([&line[..], &entry("/tmp/x"), &end].concat(), 2, "/tmp/x"),
        ([&line[..], &entry("./x")].concat(), 4, "read the tree"),
        (b"fcd-copy 1 dir ".to_vec(), 4, "read what the guest sends"),
        (vec![b'x'; 1 << 20], 2, "it is not a copy"),
        ([&line[..], &[7; 4096]].concat(), 2, "a header is damaged"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("to")).unwrap();
        let fake = hostile(sent, 0);
        let to = dir.path().join("to");
        let args = ["cp", "web:/d/.", to.to_str().unwrap()];
        let ran = fcctl_from(&fake, Start::default(), &args);
        assert_eq!(ran.status, status, "{}", ran.err);
        assert!(
            ran.err.contains(text) && !ran.err.contains('\x1b'),
            "{}",
            ran.err
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let left: Vec<_> = fs::read_dir(&to)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert!(left.is_empty() || left == ["x"], "{left:?}");
    }
}

#[test]
fn stop_of_vm_ends_copy_and_leaves_no_half_file() {
    let fake = Fake::start(|mut r: Request| {
        let names: Vec<String> = serde_json::from_value(r.params["streams"].clone()).unwrap();
        let fds = std::mem::take(&mut r.fds);
        let mut streams = names
            .iter()
            .zip(fds)
            .map(|(name, fd)| (name.as_str(), File::from(fd)));
        let (name, mut stream) = streams.next().unwrap();
        if name == "stdin" {
            stream.read_exact(&mut [0; 100_000]).unwrap();
        } else {
            use std::io::Write;
            let mut header = tar::Header::new_gnu();
            header.set_size(1 << 20);
            header.set_mode(0o644);
            header.as_gnu_mut().unwrap().name[..3].copy_from_slice(b"./f");
            header.set_cksum();
            stream.write_all(b"fcd-copy 1 file 1048576\n").unwrap();
            stream.write_all(header.as_bytes()).unwrap();
            stream.write_all(&[0; 5000]).unwrap();
        }
        drop((stream, streams.collect::<Vec<_>>()));
        r.fault(Error::new(
            Kind::Cancelled,
            "exec in VM web: the VM was stopped",
        ));
    });
    let dir = tempfile::tempdir().unwrap();
    let big = dir.path().join("big");
    fs::write(&big, vec![1; 4 << 20]).unwrap();
    let new = dir.path().join("new");
    for args in [
        ["cp", big.to_str().unwrap(), "web:/x"],
        ["cp", "web:/x", new.to_str().unwrap()],
        ["cp", "web:/x", big.to_str().unwrap()],
    ] {
        let ran = fcctl_from(&fake, Start::default(), &args);
        assert_eq!(
            (ran.status, ran.err.as_str()),
            (130, "fcctl: exec in VM web: the VM was stopped\n")
        );
        let left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["big"]);
        assert_eq!(fs::metadata(&big).unwrap().len(), 4 << 20);
    }
}

#[test]
fn signal_ends_copy() {
    let (asked, began) = crossbeam_channel::bounded(4);
    let fake = Fake::start(move |mut r: Request| {
        if r.method == "vm.show" {
            let vm = super::super::super::tests::vm("web", crate::api::vm::VmState::Running);
            return r.result(json!({"vm": vm}));
        }
        asked.send(()).unwrap();
        r.wait_for_hangup();
    });
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f");
    fs::write(&file, vec![1; 4 << 20]).unwrap();
    let (file, new) = (file.to_str().unwrap(), dir.path().join("new"));
    let (idle, _keep) = std::io::pipe().unwrap();
    for args in [
        ["cp", file, "web:/x"],
        ["cp", "web:/x", new.to_str().unwrap()],
        ["cp", "web:/x", "-"],
        ["cp", "-", "web:/x"],
        ["cp", "web:/x", "web:/y"],
    ] {
        let (sender, signals) = crossbeam_channel::unbounded();
        let began = began.clone();
        let waiting = crate::host::thread::spawn("sender", move || {
            began
                .recv_timeout(std::time::Duration::from_secs(20))
                .unwrap();
            sender.send(signal_hook::consts::signal::SIGINT).unwrap();
            sender
        });
        let start = Start {
            stdin: File::from(OwnedFd::from(idle.try_clone().unwrap())),
            signals,
            ..Start::default()
        };
        let ran = fcctl_from(&fake, start, &args);
        assert_eq!(
            (ran.status, ran.err.as_str()),
            (130, "fcctl: interrupted\n"),
            "{args:?}"
        );
        drop(waiting.unwrap().join());
        assert!(!new.exists());
    }
}

#[test]
fn file_of_host_with_colon_is_explained() {
    let site = Site::new();
    let dir = tempfile::tempdir().unwrap();
    let fake = daemon();
    let name = dir.path().join("a:b");
    fs::write(&name, "x").unwrap();
    // A word with a slash before the colon is a path on the host.
    site.ok(&format!("{} web:x", name.display()));
    assert_eq!(fs::read(site.path("guest/x")).unwrap(), b"x");
    let ran = fcctl_from(&fake, Start::default(), &["cp", "a:b", "/tmp/none"]);
    assert_eq!(
        (ran.status, ran.err.as_str()),
        (3, "fcctl: no VM a\nhint: fcctl ps -a\n")
    );
}
