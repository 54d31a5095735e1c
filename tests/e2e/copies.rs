//! Tests of copying a tree into a guest with its bytes, modes, links and git state, and of copying
//! it again.

use crate::host::{FCCTL, Host, text};
use crate::tree::Site;
use std::fs;
use std::process::Command;

#[test]
fn tree_is_copied_unchanged() {
    let host = Host::start();
    host.boot("box");
    every_kind_of_name_and_file(&host);
    a_repository_with_everything_at_once(&host);
    no_commits_yet(&host);
    a_detached_head(&host);
    a_subdirectory_brings_all(&host);
    a_tree_that_is_no_repository(&host);
}

#[test]
fn tree_is_copied_again_and_by_other_commands() {
    let host = Host::start();
    host.boot("box");
    a_second_prepare(&host);
    history_is_as_deep_as_asked(&host);
    nothing_of_a_hostile_repository_runs(&host);
    readonly(&host);
    a_tar_from_stdin(&host);
    a_tar_through_exec(&host);
}

fn every_kind_of_name_and_file(host: &Host) {
    let site = Site::unborn(host, "box", "names");
    let names = [
        "a b",
        "new\nline",
        "-rf",
        "--",
        "tab\there",
        "$(x)",
        "quote'\"",
        "é",
        "back\\slash",
        "*",
        "%41",
        "trailing ",
        " x",
    ];
    for name in names {
        site.write(name, name);
        site.write(format!("in {name}/{name}"), name);
    }
    site.write(b"raw\xff\xfe\x01", b"\0\xff");
    site.write(b"dir\xe9/raw\x80", "in a directory whose name is not UTF-8");
    site.write("n".repeat(255), "long");
    site.write("é".repeat(127) + "/" + &"m".repeat(255), "long in long");
    site.write("directory-name/".repeat(200) + "deep", "3,004 bytes");
    site.write("empty", "");
    fs::create_dir_all(site.path("nothing/in it")).unwrap();
    for (name, mode) in [("run", 0o755), ("private", 0o600), ("private-run", 0o700)] {
        site.write(name, "#!/bin/sh\n");
        site.chmod(name, mode);
    }
    for (target, name) in [
        ("nowhere/at all", "dangling"),
        ("/etc/passwd", "absolute"),
        ("loop", "loop"),
        ("pong", "ping"),
    ] {
        site.link(target, name);
    }
    site.link("ping", "pong");
    site.link("in a b", "to-directory");
    site.link(&"t".repeat(300), "long-target");
    site.git(&[
        "add",
        "--",
        "a b",
        "-rf",
        "empty",
        "run",
        "loop",
        "in new\nline",
        "in -rf",
    ]);
    site.git(&["commit", "-qm", "some"]);
    site.prepare();
    site.assert_same_tree();
    site.assert_same_status();
    assert!(
        site.said_in_guest("ls -d nothing 2>&1 || true")
            .contains("No such file"),
        "git does not copy empty directories"
    );
    // Copies everything back.
    let back = site.beside("back");
    site.export(&["--tree", back.to_str().unwrap()]);
    site.assert_is_guests(&back);
}

/// The files are staged, unstaged, both, renamed, deleted, added with `git add -N`, untracked,
/// ignored, and ignored but tracked.
fn a_repository_with_everything_at_once(host: &Host) {
    let site = Site::unborn(host, "box", "dirty");
    site.write(".gitignore", "*.o\nbuild/\n");
    for name in ["a", "b", "dir/b", "gone", "gone-staged", "run"] {
        site.write(name, format!("{name}\n"));
    }
    site.write("renamed", "some content to recognise\n");
    site.commit("first");
    site.write("a", "staged\n");
    site.git(&["add", "a"]);
    site.write("a", "staged, and changed again\n");
    site.write("b", "not staged\n");
    site.write("dir/b", "staged\n");
    site.git(&["add", "dir/b"]);
    fs::remove_file(site.path("gone")).unwrap();
    site.git(&["rm", "-q", "gone-staged"]);
    site.git(&["mv", "renamed", "renamed2"]);
    site.chmod("run", 0o755);
    site.write("intended", "not yet\n");
    site.git(&["add", "-N", "intended"]);
    site.write("staged-new", "");
    site.git(&["add", "staged-new"]);
    site.write("untracked/file", "new\n");
    site.write("forced.o", "tracked although ignored");
    site.git(&["add", "-f", "forced.o"]);
    site.write("x.o", "ignored");
    site.write("build/out", "ignored");
    site.prepare();
    let status = site.assert_same_status();
    for line in [
        "MM a\n",
        " M b\n",
        "M  dir/b\n",
        " D gone\n",
        "D  gone-staged\n",
        "R  renamed -> renamed2\n",
        " M run\n",
    ] {
        assert!(status.contains(line), "{line:?} in {status}");
    }
    for line in [
        " A intended\n",
        "A  staged-new\n",
        "?? untracked/\n",
        "A  forced.o\n",
    ] {
        assert!(status.contains(line), "{line:?} in {status}");
    }
    site.assert_same_output(
        "git diff; git diff --cached; git log --format='%H %an %s'; git symbolic-ref HEAD",
    );
    // The guest does not have the ignored files. Once the host has removed them too, the trees are
    // equal.
    site.git(&["clean", "-fdXq"]);
    site.assert_same_tree();
    site.in_guest("git fsck --strict --no-dangling; git add -A; git commit -qm 'in the guest'; test -z \"$(git status -s)\"");
    assert_eq!(
        site.said_in_guest("git log -1 --format='%an %ae'"),
        "U Ser u@example.org\n"
    );
}

fn no_commits_yet(host: &Host) {
    let site = Site::unborn(host, "box", "unborn");
    site.write("staged", "x");
    site.git(&["add", "staged"]);
    site.write("loose", "y");
    site.prepare();
    site.assert_same_tree();
    assert!(site.assert_same_status().ends_with("A  staged\n?? loose\n"));
    site.assert_same_output("git symbolic-ref HEAD");
    site.in_guest("git commit -qm 'the first one'; git log --oneline; git fsck --strict");
}

fn a_detached_head(host: &Host) {
    let site = Site::unborn(host, "box", "detached");
    site.write("a", "x");
    site.commit("first");
    site.write("a", "y");
    site.commit("second");
    site.git(&["checkout", "-q", "--detach", "HEAD~1"]);
    site.write("a", "changed\n");
    site.prepare();
    site.assert_same_tree();
    assert!(site.assert_same_status().ends_with(" M a\n"));
    site.assert_same_output("git rev-parse HEAD; git branch --show-current; git log --format=%s");
}

fn a_subdirectory_brings_all(host: &Host) {
    let site = Site::unborn(host, "box", "sub");
    site.write("top", "x");
    site.write("dir/in it/x", "x");
    site.commit("first");
    site.write("dir/new", "x");
    let args = [
        "workspace",
        "prepare",
        "box",
        "dir/in it",
        "--guest-path",
        &site.guest,
    ];
    let out = site.fcctl(&args);
    assert!(out.status.success(), "{:?}", text(&out));
    site.assert_same_tree();
    site.assert_same_status();
    assert_eq!(
        host.ok(&["exec", "box", "--", "pwd"]),
        "/root/sub/dir/in it\n",
        "commands start in the copied directory"
    );
}

fn a_tree_that_is_no_repository(host: &Host) {
    let site = Site::plain(host, "box", "plain");
    site.write(".gitignore", "*.o\n");
    site.write("x.o", "not ignored: nothing is a repository here");
    site.write("sub/y", "y");
    site.write("a\nb/-c", "z");
    site.link("../nowhere", "sub/dangling");
    fs::create_dir_all(site.path("empty/in empty")).unwrap();
    site.chmod("sub/y", 0o640);
    site.chmod("sub", 0o750);
    site.prepare();
    site.assert_same_tree();
    assert!(
        site.said_in_guest("git status 2>&1 || true")
            .contains("not a git repository")
    );
}

fn a_second_prepare(host: &Host) {
    let site = Site::unborn(host, "box", "again");
    for name in [
        "host-edits",
        "host-deletes",
        "guest-edits",
        "both-edit",
        "guest-deletes",
        "same",
        "dir/deep",
    ] {
        site.write(name, format!("{name}\n"));
    }
    site.commit("first");
    assert!(
        !site.prepare().contains("kept"),
        "the first import keeps no files of the guest"
    );
    site.write("host-edits", "edited on the host\n");
    site.write("both-edit", "by the host\n");
    site.write("host-new", "new\n");
    fs::remove_file(site.path("host-deletes")).unwrap();
    fs::remove_dir_all(site.path("dir")).unwrap();
    site.commit("second");
    site.in_guest("echo guest > guest-edits; echo guest > both-edit; rm guest-deletes; echo guest > guest-new");
    let said = site.prepare();
    for name in ["guest-edits", "both-edit", "guest-deletes", "guest-new"] {
        assert_eq!(
            said.lines()
                .filter(|l| l.trim_start_matches("fcctl: ").trim() == name)
                .count(),
            1,
            "{name} is not in {said}"
        );
    }
    assert!(
        said.contains("kept 4 files") && said.contains("--overwrite"),
        "{said}"
    );
    // Files that only the guest has are also kept.
    let now = "cat host-edits guest-edits both-edit host-new guest-new; ls -d host-deletes guest-deletes dir 2>/dev/null || true";
    assert_eq!(
        site.said_in_guest(now),
        "edited on the host\nguest\nguest\nnew\nguest\n"
    );
    assert_eq!(
        site.said_in_guest("git log --format=%s; git status --porcelain")
            .replace('\n', "|"),
        "second|first| M both-edit| D guest-deletes| M guest-edits|?? guest-new|"
    );
    assert!(!site.prepare_with(&["--overwrite"]).contains("kept"));
    site.assert_same_tree();
    site.assert_same_status();
    site.in_guest("git fsck --strict");
}

fn history_is_as_deep_as_asked(host: &Host) {
    let mut site = Site::unborn(host, "box", "history");
    site.write("a", "x");
    site.commit("the first");
    site.on_host("for i in $(seq 59); do echo $i > a; git commit -qam \"number $i\"; done");
    for (name, args, commits) in [
        ("default", &[][..], "50"),
        ("three", &["--history", "3"], "3"),
        ("all", &["--history", "full"], "60"),
    ] {
        site.guest = format!("/root/history-{name}");
        site.prepare_with(args);
        let script = "git fsck --strict; git log --format=%s | tail -n 1 > /dev/null; git rev-list --count HEAD
            echo x >> a; git commit -qam 'in the guest'; git log -2 --format=%s; git diff --stat HEAD~1 HEAD | tail -n 1";
        let said = site.said_in_guest(script);
        let expected =
            format!("{commits}\nin the guest\nnumber 59\n 1 file changed, 1 insertion(+)\n");
        assert_eq!(said, expected, "--history {name}");
    }
    site.guest = "/root/history-none".into();
    site.prepare_with(&["--history", "none"]);
    site.assert_same_tree();
    assert_eq!(site.said_in_guest("ls -A"), "a\n");
}

fn nothing_of_a_hostile_repository_runs(host: &Host) {
    let site = Site::unborn(host, "box", "hostile");
    let canary = site.beside("canary");
    let script = format!("#!/bin/sh\necho \"$0\" >> {}\ncat\n", canary.display());
    site.write("evil", &script);
    site.chmod("evil", 0o755);
    site.write("a", "x\n");
    site.write(".gitattributes", "* filter=x diff=x\n");
    site.commit("first");
    for hook in [
        "post-index-change",
        "pre-auto-gc",
        "reference-transaction",
        "post-checkout",
        "pre-applypatch",
    ] {
        site.write(format!(".git/hooks/{hook}"), &script);
        site.chmod(&format!(".git/hooks/{hook}"), 0o755);
    }
    let evil = site.path("evil");
    let evil = evil.to_str().unwrap();
    for key in [
        "core.fsmonitor",
        "filter.x.clean",
        "filter.x.smudge",
        "filter.x.process",
        "diff.x.textconv",
    ] {
        site.git(&["config", key, evil]);
    }
    for key in [
        "diff.external",
        "core.pager",
        "core.sshCommand",
        "core.alternateRefsCommand",
        "uploadpack.packObjectsHook",
    ] {
        site.git(&["config", key, evil]);
    }
    site.write("a", "touched, so that its filter would be asked\n");
    // The trap works: when the user runs git, git triggers it.
    let _ = fs::remove_file(&canary);
    let _ = Command::new("timeout")
        .args(["10", "git", "status"])
        .current_dir(site.root())
        .output()
        .unwrap();
    assert!(
        canary.exists(),
        "the hostile repository runs nothing at all"
    );
    fs::remove_file(&canary).unwrap();
    site.prepare();
    site.in_guest("echo guest >> a");
    site.export(&["--patch", site.beside("p").to_str().unwrap()]);
    site.export(&["--tree", site.beside("t").to_str().unwrap()]);
    assert!(!canary.exists(), "ran: {:?}", fs::read_to_string(&canary));
    assert_eq!(
        site.said_in_guest("ls .git/hooks 2>/dev/null || true; grep -c evil .git/config || true"),
        "pre-commit\n0\n"
    );
}

fn readonly(host: &Host) {
    let site = Site::unborn(host, "box", "readonly");
    site.write("a", "x");
    site.commit("first");
    site.prepare_with(&["--readonly"]);
    site.assert_same_tree();
    site.assert_same_status();
    for attempt in ["echo y > a", "touch new", "rm a", "touch .git/x"] {
        let (_, stderr) = text(&site.in_guest_out(attempt));
        assert!(
            stderr.contains("Read-only file system"),
            "{attempt}: {stderr}"
        );
    }
    site.write("a", "y");
    site.prepare_with(&["--readonly"]);
    site.assert_same_tree();
    assert!(!site.in_guest_out("touch new").status.success());
    site.prepare();
    site.in_guest("touch new && rm new");
    site.assert_same_tree();
}

/// Runs a line of shell on the host. `$FCCTL` in the line stands for fcctl with this host's socket.
#[track_caller]
fn pipeline(site: &Site, script: &str) {
    let fcctl = format!("'{FCCTL}' --socket '{}'", site.host.socket().display());
    site.on_host(&script.replace("$FCCTL", &fcctl));
}

fn a_tar_from_stdin(host: &Host) {
    let site = Site::plain(host, "box", "tarred");
    site.write("a b\nc", "x");
    site.write(b"raw\xff", "y");
    site.write("run", "#!/bin/sh\n");
    site.chmod("run", 0o755);
    site.write("deep/er/x", "");
    site.link("nowhere", "link");
    fs::create_dir(site.path("empty")).unwrap();
    pipeline(
        &site,
        "tar c . | $FCCTL workspace prepare box --tar - --guest-path /root/tarred",
    );
    site.assert_same_tree();
    site.in_guest("echo more >> run");
    let (patch, _) = site.export(&[]);
    let patch = String::from_utf8(patch).unwrap();
    assert!(
        patch.contains("+more") && patch.matches("diff --git").count() == 1,
        "{patch}"
    );
}

fn a_tar_through_exec(host: &Host) {
    let site = Site::plain(host, "box", "piped");
    site.write("a b\nc", "x");
    site.write(b"raw\xff", vec![0xa5; 3_000_000]);
    site.link("nowhere", "link");
    host.ok(&["exec", "box", "--", "mkdir", "/root/piped"]);
    pipeline(
        &site,
        "tar c . | $FCCTL exec box -i -w /root/piped -- tar x",
    );
    site.assert_same_tree();
}
