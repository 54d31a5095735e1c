use super::*;
use crate::error::Kind;
use crate::workspace::plan::TreeKind;
use std::os::unix::fs::symlink;

#[test]
fn import_every_kind_of_name_and_file() {
    let site = Site::unborn();
    for name in [
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
    ] {
        site.write(name, name);
        site.write(&format!("in {name}/{name}"), name);
    }
    std::fs::write(site.path(OsStr::from_bytes(b"raw\xff\xfe\x01")), b"\0\xff").unwrap();
    site.write(&"n".repeat(255), "long");
    site.write(&format!("{}deep", "directory-name/".repeat(60)), "deep");
    site.write("empty", "");
    site.write("private", "x");
    site.chmod("private", 0o600);
    site.write("run", "#!/bin/sh\n");
    site.chmod("run", 0o755);
    symlink("nowhere/at all", site.path("dangling")).unwrap();
    symlink("/etc/passwd", site.path("absolute")).unwrap();
    symlink("loop", site.path("loop")).unwrap();
    symlink("in a b", site.path("to-dir")).unwrap();
    symlink("t".repeat(300), site.path("long-target")).unwrap();
    site.git(&["add", "--", "a b", "-rf", "empty", "run", "loop"]);
    site.prepare();
    site.assert_same_tree();
    site.assert_same_status();
    assert_eq!(site.status(), Status::Complete);
}

fn is_tmpfs(path: &Path) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994; // statfs(2)
    rustix::fs::statfs(path).unwrap().f_type == TMPFS_MAGIC
}

#[test]
fn import_keeps_holes() {
    use std::os::unix::fs::FileExt;
    const LENGTH: u64 = 1 << 24;
    let site = Site::unborn();
    let file = std::fs::File::create(site.path("sparse")).unwrap();
    for i in 0..40u64 {
        file.write_all_at(b"data", i * 400_000).unwrap();
    }
    file.set_len(LENGTH).unwrap();
    std::fs::File::create(site.path("hole"))
        .unwrap()
        .set_len(LENGTH)
        .unwrap();
    let mut plan = site.plan().unwrap();
    assert!(plan.bytes_expected() < 1 << 22);
    let (sent, _) = site.prepare_with(&mut plan, false).unwrap();
    assert!(sent.bytes < 1 << 22, "{}", sent.bytes);
    for name in ["sparse", "hole"] {
        let got = std::fs::metadata(site.guest().join(name)).unwrap();
        assert_eq!(got.len(), LENGTH);
        // git maps files, and tmpfs, where scripts/test --quick runs, allocates a hole that is read
        // through a mapping.
        assert!(got.blocks() * 512 < 1 << 22 || is_tmpfs(&site.guest()));
    }
    run(Command::new("cmp")
        .arg(site.path("sparse"))
        .arg(site.guest().join("sparse")));
}

#[test]
fn import_keeps_git_status_with_all_changes_at_once() {
    let site = Site::committed();
    site.write(".gitignore", "*.o\nbuild/\n");
    site.write("gone", "x");
    site.write("gone-staged", "x");
    site.write("renamed", "some content to recognise\n");
    site.write("empty-tracked", "");
    site.commit("second");
    site.write("a", "changed\n");
    site.git(&["add", "a"]);
    site.write("a", "changed twice\n");
    site.write("dir/b", "staged\n");
    site.git(&["add", "dir/b"]);
    std::fs::remove_file(site.path("gone")).unwrap();
    site.git(&["rm", "-q", "gone-staged"]);
    site.git(&["mv", "renamed", "renamed2"]);
    site.chmod("run", 0o644);
    site.write("intended", "not yet\n");
    site.git(&["add", "-N", "intended"]);
    site.write("staged-empty", "");
    site.git(&["add", "staged-empty"]);
    site.write("untracked/file", "new\n");
    site.write("x.o", "ignored");
    site.write("build/out", "ignored");
    site.write("forced.o", "tracked although ignored");
    site.git(&["add", "-f", "forced.o"]);
    site.git(&["update-index", "--assume-unchanged", "empty-tracked"]);
    site.write("empty-tracked", "changed, but assumed not to be");
    site.prepare();
    site.assert_same_status();
    assert!(!site.guest().join("x.o").exists() && !site.guest().join("build").exists());
    assert!(site.guest().join("forced.o").exists());
    assert_eq!(site.git_guest(&["log", "--format=%s"]), "second\nfirst\n");
    assert_eq!(
        site.git_guest(&["symbolic-ref", "HEAD"]),
        "refs/heads/trunk\n"
    );
    assert_eq!(
        site.git(&["diff", "--cached"]),
        site.git_guest(&["diff", "--cached"])
    );
    assert_eq!(site.git(&["diff"]), site.git_guest(&["diff"]));
    site.git_guest(&["fsck", "--strict", "--no-dangling"]);
    site.git_guest(&["add", "-A"]);
    site.git_guest(&["commit", "-q", "-m", "in the guest"]);
    assert_eq!(
        site.git_guest(&["log", "-1", "--format=%an %ae"]),
        "U Ser u@example.org\n"
    );
}

#[test]
fn import_keeps_merge_conflicts() {
    let site = Site::committed();
    site.git(&["checkout", "-q", "-b", "other"]);
    site.write("a", "other\n");
    site.commit("other");
    site.git(&["checkout", "-q", "trunk"]);
    site.write("a", "mine\n");
    site.commit("mine");
    let c = Command::new("git")
        .args(["merge", "-q", "other"])
        .cwd(site.host())
        .env("HOME", site.dir.path().join("home"));
    assert_eq!(
        run_any_status(&c, &cancel(), &mut |_| {}).unwrap().status,
        1
    );
    site.prepare();
    site.assert_same_status();
    assert!(
        site.git_guest(&["status", "--porcelain"])
            .starts_with("UU a")
    );
    assert_eq!(site.git_guest(&["show", ":3:a"]), "other\n");
}

#[test]
fn import_unborn_detached_and_oddly_named_heads() {
    let unborn = Site::unborn();
    unborn.write("staged", "x");
    unborn.git(&["add", "staged"]);
    unborn.write("loose", "y");
    unborn.prepare();
    unborn.assert_same_status();
    assert_eq!(
        unborn.git_guest(&["symbolic-ref", "HEAD"]),
        "refs/heads/trunk\n"
    );

    let empty = Site::unborn();
    empty.prepare();
    empty.assert_same_status();

    let site = Site::committed();
    site.git(&["checkout", "-q", "--detach"]);
    site.prepare();
    site.assert_same_status();
    assert_eq!(
        site.git(&["rev-parse", "HEAD"]),
        site.git_guest(&["rev-parse", "HEAD"])
    );
    assert_eq!(site.git_guest(&["branch", "--show-current"]), "");

    let site = Site::committed();
    site.git(&["checkout", "-q", "-b", "feature/$(x);'é"]);
    site.prepare();
    assert_eq!(
        site.git(&["branch", "--show-current"]),
        site.git_guest(&["branch", "--show-current"])
    );
}

#[test]
fn import_from_a_subdirectory_sends_the_whole_repository() {
    let site = Site::committed();
    site.write("untracked dir/x", "x");
    std::fs::create_dir(site.path("nothing in it")).unwrap();
    for (name, subdir) in [
        ("dir", "dir"),
        ("untracked dir", "untracked dir"),
        ("nothing in it", "nothing in it"),
        (".", ""),
    ] {
        let mut plan = Plan::inspect(
            &site.path(name),
            &site.options(History::default()),
            &cancel(),
        )
        .unwrap();
        assert_eq!(
            (plan.subdir(), plan.guest_path().as_str()),
            (subdir, "/root/repo")
        );
        site.prepare_with(&mut plan, false).unwrap();
        assert!(site.guest().join(subdir).is_dir());
    }
    site.assert_same_tree();
    let e = Plan::inspect(
        &site.path(".git/refs"),
        &site.options(History::default()),
        &cancel(),
    )
    .err()
    .unwrap();
    assert_eq!(e.kind(), Kind::InvalidTree);
}

#[test]
fn import_tree_without_a_repository_sends_all_files() {
    let site = Site::plain();
    site.write(".gitignore", "*.o\n");
    site.write("x.o", "not ignored: nothing is a repository here");
    site.write("sub/y", "y");
    std::fs::create_dir_all(site.path("empty/in empty")).unwrap();
    site.chmod("sub/y", 0o640);
    site.chmod("sub", 0o750);
    site.write("inner/.git/config", "[core]\n");
    site.write("inner/file", "x");
    let plan = site.plan().unwrap();
    assert_eq!(plan.kind, TreeKind::Plain);
    assert!(
        plan.warnings()[0]
            .contains("inner/.git is sent, but is never part of an exported patch or tree")
    );
    site.prepare();
    site.assert_same_tree();
    assert!(site.guest().join("empty/in empty").is_dir());
    assert_eq!(
        std::fs::metadata(site.guest().join("sub")).unwrap().mode() & 0o777,
        0o750
    );
    assert!(!site.guest().join(".git").exists());
}

#[test]
fn import_sends_the_requested_depth_of_history() {
    let site = Site::committed();
    for i in 0..20 {
        site.git(&[
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            &format!("number {i}"),
        ]);
        if i == 10 {
            site.git(&["tag", "-a", "-m", "t", "inside"]);
            site.git(&["branch", "side"]);
        }
    }
    site.git(&["tag", "outside", "HEAD~15"]);
    site.git(&["checkout", "-q", "side"]);
    site.git(&["commit", "-q", "--allow-empty", "-m", "on the side"]);
    site.git(&["checkout", "-q", "trunk"]);
    site.git(&["merge", "-q", "-m", "merge", "side"]);
    assert_eq!(History::default(), History::Depth(50));
    let depths = ["1", "4", "12", "500", "full"];
    let counts = depths.map(|depth| {
        let history: History = depth.parse().unwrap();
        let (into, url) = (
            tempfile::tempdir().unwrap(),
            format!("file://{}", site.host().display()),
        );
        let home = site.dir.path().join("home");
        let cut = if history == History::Full {
            String::new()
        } else {
            format!("--depth={depth}")
        };
        let args = [
            "clone",
            "-q",
            "--bare",
            "--single-branch",
            "--no-tags",
            &url,
            "c",
            &cut,
        ];
        git(
            into.path(),
            &home,
            &args[..args.len() - usize::from(cut.is_empty())],
        );
        let ours = Site::plain();
        let mut plan = Plan::inspect(&site.host(), &site.options(history), &cancel()).unwrap();
        ours.prepare_with(&mut plan, false).unwrap();
        let look = |args: &[&str]| {
            let (theirs, ours) = (
                git(&into.path().join("c"), &home, args),
                ours.git_guest(args),
            );
            assert_eq!(theirs, ours, "{depth}: {args:?}");
            ours
        };
        look(&["rev-parse", "--is-shallow-repository"]);
        look(&["log", "--format=%H %s"]);
        ours.git_guest(&["fsck", "--no-dangling"]);
        assert_eq!(ours.git_guest(&["status", "--porcelain"]), "");
        let tags = ours.git_guest(&["tag"]);
        (
            look(&["rev-list", "--count", "HEAD"])
                .trim()
                .parse::<u32>()
                .unwrap(),
            tags.lines().count(),
        )
    });
    assert_eq!(counts[0], (1, 0));
    assert!(
        counts[1].0 > 4 && counts[1].0 < counts[2].0 && counts[2].0 < 23,
        "{counts:?}"
    );
    assert_eq!(counts[3..], [(23, 2), (23, 2)]);
    assert_eq!(site.git(&["describe"]).lines().count(), 1);
}

#[test]
fn import_without_history_sends_only_files() {
    let site = Site::committed();
    site.write(".gitignore", "*.o\n");
    site.write("x.o", "ignored");
    let mut plan = Plan::inspect(&site.host(), &site.options(History::None), &cancel()).unwrap();
    assert_eq!(plan.kind, TreeKind::GitFiles);
    site.prepare_with(&mut plan, false).unwrap();
    assert!(!site.guest().join(".git").exists() && !site.guest().join("x.o").exists());
    site.write_guest("y.o", "ignored there, too");
    site.write_guest("a", "changed\n");
    let (patch, changed) = site.export_patch().unwrap();
    assert_eq!(changed, 1, "{}", String::from_utf8_lossy(&patch));
}

#[test]
fn import_of_a_shallow_clone_stays_shallow() {
    let site = Site::committed();
    for i in 0..5 {
        site.write("a", format!("{i}\n"));
        site.commit("more");
    }
    let url = format!("file://{}", site.host().display());
    let clone = Site::plain();
    std::fs::remove_dir(clone.host()).unwrap();
    git(
        &site.host(),
        &site.dir.path().join("home"),
        &[
            "clone",
            "-q",
            "--depth",
            "2",
            &url,
            clone.host().to_str().unwrap(),
        ],
    );
    clone.prepare();
    clone.assert_same_status();
    assert_eq!(clone.git_guest(&["rev-list", "--count", "HEAD"]), "2\n");
    clone.git_guest(&["fsck"]);
}

#[test]
fn import_worktree_as_repository_and_submodule_as_commit() {
    let site = Site::committed();
    let other = site.dir.path().join("host/tree");
    site.git(&["worktree", "add", "-q", "-b", "wt", other.to_str().unwrap()]);
    std::fs::write(other.join("extra"), "x").unwrap();
    let mut plan = Plan::inspect(&other, &site.options(History::default()), &cancel()).unwrap();
    site.prepare_with(&mut plan, false).unwrap();
    assert_eq!(site.git_guest(&["status", "--porcelain"]), "?? extra\n");
    assert_eq!(site.git_guest(&["branch", "--show-current"]), "wt\n");

    let site = Site::committed();
    let inner = Site::committed();
    let url = inner.host();
    site.git(&[
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "--quiet",
        "add",
        url.to_str().unwrap(),
        "sub",
    ]);
    site.git(&["commit", "-q", "-m", "sub"]);
    run(Command::new("git")
        .args(["init", "-q", "nested"])
        .cwd(site.host()));
    site.write("nested/x", "x");
    let plan = site.plan().unwrap();
    let text = plan.warnings().join("\n");
    assert!(
        text.contains("submodule sub") && text.contains("left out nested"),
        "{text}"
    );
    site.prepare();
    assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
    assert!(site.guest().join("sub").is_dir() && !site.guest().join("sub/a").exists());
    assert_eq!(
        site.git(&["rev-parse", "HEAD:sub"]),
        site.git_guest(&["rev-parse", ":sub"])
    );
    // This imports the submodule itself.
    let mut plan = Plan::inspect(
        &site.path("sub"),
        &site.options(History::default()),
        &cancel(),
    )
    .unwrap();
    let fresh = Site {
        workspace: Site::plain().workspace,
        ..Site::plain()
    };
    fresh.prepare_with(&mut plan, false).unwrap();
    assert_eq!(fresh.git_guest(&["status", "--porcelain"]), "");
}

#[test]
fn import_applies_the_callers_ignore_rules_on_both_sides() {
    let site = Site::committed();
    write(
        &site.dir.path().join("home"),
        ".config/git/ignore",
        "*.swp\n",
    );
    site.write("a.swp", "x");
    site.write(".git/info/exclude", "*.secret\n");
    site.write("b.secret", "x");
    site.prepare();
    assert!(!site.guest().join("a.swp").exists() && !site.guest().join("b.secret").exists());
    site.write_guest("c.swp", "x");
    site.write_guest("d.secret", "x");
    assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
    assert_eq!(site.export_patch().unwrap(), (Vec::new(), 0));
}

#[test]
fn import_carries_line_ending_and_other_settings() {
    let site = Site::committed();
    site.git(&["config", "core.autocrlf", "true"]);
    site.git(&["config", "core.fileMode", "false"]);
    site.write("crlf", "one\r\ntwo\r\n");
    site.commit("crlf");
    site.chmod("a", 0o755);
    site.prepare();
    site.assert_same_status();
    assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
    assert_eq!(
        std::fs::read(site.guest().join("crlf")).unwrap(),
        b"one\r\ntwo\r\n"
    );
    assert_eq!(site.export_patch().unwrap().1, 0);
}

#[test]
fn import_sha256_repository() {
    let site = Site::plain();
    site.git(&["init", "-q", "--object-format=sha256"]);
    site.git(&["config", "user.email", "x@y"]);
    site.git(&["config", "user.name", "x"]);
    site.write("a", "x\n");
    site.commit("one");
    site.write("a", "y\n");
    site.prepare();
    site.assert_same_status();
    site.write_guest("b", "new\n");
    site.write("a", "z\n");
    assert_eq!(site.prepare(), ["b"]);
    assert_eq!(site.export_patch().unwrap().1, 1);
}

#[test]
fn import_leaves_out_special_files_with_a_warning() {
    let site = Site::committed();
    run(Command::new("mkfifo").arg(site.path("fifo")));
    let _socket = std::os::unix::net::UnixListener::bind(site.path("socket")).unwrap();
    std::fs::remove_file(site.path("a")).unwrap();
    run(Command::new("mkfifo").arg(site.path("a")));
    let plan = site.plan().unwrap();
    let text = plan.warnings().join("\n");
    assert!(text.contains("left out a: it is a FIFO"), "{text}");
    site.prepare();
    assert_eq!(listing(&site.guest()).len(), 2);

    let plain = Site::plain();
    plain.write("x", "x");
    run(Command::new("mkfifo").arg(plain.path("fifo")));
    assert!(plain.plan().unwrap().warnings()[0].contains("FIFO"));
    plain.prepare();
    assert_eq!(listing(&plain.guest()).len(), 1);
}

#[test]
fn import_file_beyond_a_link_counts_as_deleted() {
    let site = Site::committed();
    write(site.dir.path(), "outside/b", "secret");
    std::fs::remove_dir_all(site.path("dir")).unwrap();
    symlink(site.dir.path().join("outside"), site.path("dir")).unwrap();
    site.prepare();
    site.assert_same_status();
    assert!(site.guest().join("dir").is_symlink());
}

#[test]
fn import_bad_tree_is_refused_with_a_reason() {
    let refused = |path: &Path, options: &Options| {
        Plan::inspect(path, options, &cancel())
            .err()
            .expect("refused")
    };
    let site = Site::committed();
    let options = site.options(History::default());
    assert_eq!(
        refused(&site.path("no-such"), &options).kind(),
        Kind::PathNotFound
    );
    assert_eq!(refused(&site.path("a"), &options).kind(), Kind::InvalidTree);

    let broken = Site::plain();
    broken.write(".git/HEAD", "nonsense");
    broken.write("secret.o", "x");
    let e = refused(&broken.host(), &options);
    assert_eq!(e.kind(), Kind::InvalidTree);
    assert!(e.hint_text().is_some());

    let empty = Site::plain();
    std::fs::create_dir(empty.path(".git")).unwrap();
    assert_eq!(refused(&empty.host(), &options).kind(), Kind::InvalidTree);

    let corrupt = Site::committed();
    let head = corrupt.git(&["rev-parse", "HEAD"]);
    std::fs::remove_file(corrupt.path(format!(".git/objects/{}/{}", &head[..2], head[2..].trim())))
        .unwrap();
    assert_eq!(refused(&corrupt.host(), &options).kind(), Kind::InvalidTree);
}

#[test]
fn import_without_git_names_the_missing_command() {
    let site = Site::committed();
    let env = CallerEnv {
        path: Some("/nonexistent".into()),
        ..CallerEnv::default()
    };
    let e = Plan::inspect(
        &site.host(),
        &Options {
            env,
            ..Options::default()
        },
        &cancel(),
    )
    .err()
    .unwrap();
    assert_eq!(e.kind(), Kind::CommandMissing);
}

#[test]
fn import_repository_of_another_user_needs_safe_directory() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: only root can make files of another owner");
        return;
    }
    let site = Site::committed();
    run(Command::new("chown").args(["-R", "65534"]).arg(site.host()));
    let e = site.plan().err().unwrap();
    assert_eq!(e.kind(), Kind::InvalidTree);
    assert!(e.hint_text().unwrap().contains("safe.directory"), "{e:?}");
    let mut options = site.options(History::default());
    options.env.sudo_uid = Some("65534".into());
    Plan::inspect(&site.host(), &options, &cancel()).unwrap();
    let config = site.dir.path().join("home/.gitconfig");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(
        &config,
        format!("{text}[safe]\n\tdirectory = {}\n", site.host().display()),
    )
    .unwrap();
    site.prepare();
    site.git_guest(&["log"]);
}

/// Root can read every file, so as root this test runs itself again as nobody.
#[test]
fn import_unreadable_files_are_named_and_nothing_is_sent() {
    if nix::unistd::geteuid().is_root() {
        let name =
            "workspace::tests::importing::import_unreadable_files_are_named_and_nothing_is_sent";
        // The program is run through a descriptor, because `nobody` may not be able to enter the
        // directories above the binary or TMPDIR.
        let me = std::fs::File::open("/proc/self/exe").unwrap();
        let program = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&me));
        let mut c = Command::new(program)
            .args(["--exact", name])
            .cwd("/")
            .env("TMPDIR", "/tmp")
            .deadline(Duration::from_secs(120));
        c.credentials = Some(crate::host::Credentials {
            uid: 65534,
            gid: 65534,
        });
        let output = run(c);
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
        return;
    }
    for site in [Site::committed(), Site::plain()] {
        site.write("secret 1", "x");
        site.write("dir/secret 2", "x");
        site.write("closed/file", "x");
        for name in ["secret 1", "dir/secret 2"] {
            site.chmod(name, 0);
        }
        let e = site.plan().err().unwrap();
        assert_eq!(e.kind(), Kind::InvalidTree);
        assert!(e.to_string().contains("dir/secret 2, secret 1"), "{e}");
        assert!(e.hint_text().is_some());
        for name in ["secret 1", "dir/secret 2"] {
            site.chmod(name, 0o600);
        }
        site.chmod("closed", 0);
        assert!(site.plan().err().unwrap().to_string().contains("closed"));
        site.chmod("closed", 0o700);
        // The file becomes unreadable between the inspection and the read.
        let mut plan = site.plan().unwrap();
        site.chmod("secret 1", 0);
        let e = plan
            .send(&mut Vec::new(), &[], &mut |_, _| {}, &cancel())
            .unwrap_err();
        assert!(e.to_string().contains("secret 1"), "{e}");
        // A file that vanished since the inspection is not an error.
        std::fs::remove_file(site.path("secret 1")).unwrap();
        let sent = plan
            .send(&mut Vec::new(), &[], &mut |_, _| {}, &cancel())
            .unwrap();
        assert!(sent.warnings[0].contains("secret 1 vanished"));
    }
}
