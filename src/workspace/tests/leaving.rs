//! Tests that an export reports what a patch or a tree cannot contain, and brings back everything
//! else.

use super::*;
use std::os::unix::fs::symlink;

/// Creates a repository as a user would in the guest.
fn guest_repository(site: &Site, at: &str, commit: bool) {
    let dir = site.guest().join(at);
    std::fs::create_dir_all(&dir).unwrap();
    let home = site.dir.path().join("guest");
    git(&dir, &home, &["init", "-q", "-b", "inner"]);
    if commit {
        git(&dir, &home, &["add", "-A"]);
        let who = ["-c", "user.name=g", "-c", "user.email=g@g"];
        git(
            &dir,
            &home,
            &[&who[..], &["commit", "-q", "--allow-empty", "-m", "inner"]].concat(),
        );
    }
}

/// Checks that the patch brings back the guest's files without any `.git`.
#[track_caller]
fn assert_files_come_back(site: &Site) {
    site.apply(&site.patch_file()).unwrap();
    let in_git = |path: &[u8]| {
        path.split(|b| *b == b'/')
            .any(|part| part.eq_ignore_ascii_case(b".git"))
    };
    // A patch records only whether a file is executable, not its whole mode.
    let files = |root: &Path| -> Listing {
        let found = listing(root).into_iter().filter(|(path, _)| !in_git(path));
        found
            .map(|(path, (mode, bytes))| (path, (mode & 0o100, bytes)))
            .collect()
    };
    assert!(files(&site.guest()) == files(&site.host()));
    let out = tempfile::tempdir().unwrap();
    unpack_tree(&site.export_tree().unwrap(), out.path()).unwrap();
    assert!(files(&site.guest()) == files(out.path()));
}

#[test]
fn export_repository_made_in_the_guest_names_its_history() {
    for commit in [false, true] {
        let site = Site::committed();
        site.prepare();
        site.write_guest("svc/main.go", "work\n");
        site.write_guest("svc/deep/er", "work\n");
        guest_repository(&site, "svc", commit);
        assert_eq!(site.left(), ["Repository svc/.git"]);
        assert!(site.export_patch().unwrap().1 == 2);
        assert_files_come_back(&site);
        // The host now has the repository's files but not its history.
        site.prepare();
        assert_eq!(site.left(), ["Repository svc/.git"]);
        site.write_guest("svc/main.go", "more work\n");
        site.write_guest("svc/new", "x\n");
        assert_files_come_back(&site);
    }
}

#[test]
fn export_nested_and_oddly_named_repositories() {
    let site = Site::committed();
    site.prepare();
    for dir in [
        "a b",
        "new\nline",
        "-rf",
        "(x) * [y] ?",
        "back\\slash & comma,",
        "é",
        "svc",
        "svc/inner",
        "svc/inner/most",
    ] {
        site.write_guest(&format!("{dir}/file of {}", dir.replace('/', "_")), dir);
    }
    for dir in [
        "a b",
        "new\nline",
        "-rf",
        "(x) * [y] ?",
        "back\\slash & comma,",
        "é",
        "svc/inner/most",
        "svc/inner",
        "svc",
    ] {
        guest_repository(&site, dir, true);
    }
    std::fs::create_dir_all(site.guest().join(OsStr::from_bytes(b"raw\xff"))).unwrap();
    run(Command::new("git")
        .args(["init", "-q"])
        .cwd(site.guest().join(OsStr::from_bytes(b"raw\xff"))));
    std::fs::write(site.guest().join(OsStr::from_bytes(b"raw\xff/x")), "x").unwrap();
    guest_repository(&site, "empty", false);
    assert_eq!(site.left().len(), 11, "{:?}", site.left());
    assert!(
        site.left()
            .contains(&"Repository svc/inner/most/.git".to_owned())
    );
    assert!(site.left().contains(&"Repository empty/.git".to_owned()));
    assert_files_come_back(&site);
}

#[test]
fn export_repository_that_replaced_a_sent_path() {
    for commit in [false, true] {
        let site = Site::committed();
        site.write("tool", "a file\n");
        site.write("link", "x");
        site.commit("tool");
        site.prepare();
        std::fs::remove_file(site.guest().join("tool")).unwrap();
        site.write_guest("tool/main", "x\n");
        guest_repository(&site, "tool", commit);
        site.write_guest("dir/new", "x\n");
        guest_repository(&site, "dir", commit);
        assert_eq!(site.left(), ["Repository dir/.git", "Repository tool/.git"]);
        assert_files_come_back(&site);
    }
}

#[test]
fn export_repository_recorded_by_the_guests_git_is_named() {
    let site = Site::committed();
    site.prepare();
    site.write_guest("svc/main.go", "work\n");
    guest_repository(&site, "svc", true);
    // The guest's git records the repository as a commit, first in the index and then in the
    // history.
    site.git_guest(&["-c", "advice.addEmbeddedRepo=false", "add", "svc"]);
    assert!(
        site.git_guest(&["ls-files", "-s", "svc"])
            .starts_with("160000")
    );
    assert_eq!(site.left(), ["Repository svc/.git"]);
    site.git_guest(&[
        "-c",
        "user.name=g",
        "-c",
        "user.email=g@g",
        "commit",
        "-q",
        "-m",
        "svc",
    ]);
    // The repository is first a submodule and then a second work tree.
    let inner = Site::committed();
    let url = inner.host();
    site.git_guest(&[
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "--quiet",
        "add",
        url.to_str().unwrap(),
        "sub",
    ]);
    site.git_guest(&["worktree", "add", "-q", "wt"]);
    let left = [
        "Repository sub/.git",
        "Repository svc/.git",
        "Repository wt/.git",
    ];
    assert_eq!(site.left(), left);
    assert_files_come_back(&site);
    assert!(
        site.path(".gitmodules").exists()
            && site.path("sub/a").exists()
            && site.path("wt/a").exists()
    );
}

#[test]
fn export_bare_repository_as_files() {
    let site = Site::committed();
    site.prepare();
    run(Command::new("git")
        .args(["init", "-q", "--bare", "store.git"])
        .cwd(site.guest()));
    site.git_guest(&["push", "-q", "store.git", "HEAD:refs/heads/main"]);
    assert_eq!(site.left(), Vec::<String>::new());
    assert_files_come_back(&site);
    assert_eq!(
        git(
            &site.path("store.git"),
            &site.dir.path().join("home"),
            &["log", "--format=%s", "main"]
        ),
        "first\n"
    );
}

#[test]
fn export_skips_ignored_files_unless_a_repository_tracks_them() {
    let site = Site::committed();
    site.write(".gitignore", "*.o\nnode_modules/\n");
    site.commit("ignore");
    site.prepare();
    site.write_guest("svc/a b/x.o", "built\n");
    site.write_guest("svc/a b/y.o", "tracked\n");
    guest_repository(&site, "svc", false);
    git(
        &site.guest().join("svc"),
        &site.dir.path().join("guest"),
        &["add", "a b/y.o"],
    );
    guest_repository(&site, "node_modules/dep", true);
    assert_eq!(site.left(), ["Repository svc/.git"]);
    let patch = String::from_utf8(site.export_patch().unwrap().0).unwrap();
    assert!(
        patch.contains("b/svc/a b/y.o") && !patch.contains("x.o"),
        "{patch}"
    );
}

#[test]
fn export_repository_in_a_plain_tree_is_named_if_the_guest_changed_it() {
    let site = Site::plain();
    site.write("x", "x\n");
    site.write("inner/file", "x\n");
    site.write("other/file", "x\n");
    for name in ["inner", "other"] {
        let (dir, home) = (site.path(name), site.dir.path().join("home"));
        git(&dir, &home, &["init", "-q", "-b", "m"]);
        git(&dir, &home, &["add", "-A"]);
        git(
            &dir,
            &home,
            &[
                "-c",
                "user.name=u",
                "-c",
                "user.email=u@u",
                "commit",
                "-q",
                "-m",
                "one",
            ],
        );
    }
    site.prepare();
    assert_eq!(site.left(), Vec::<String>::new());
    site.write_guest("inner/file", "changed\n");
    guest_repository(&site, "inner", true);
    site.write_guest("new/file", "x\n");
    guest_repository(&site, "new", false);
    guest_repository(&site, ".", false);
    assert_eq!(
        site.left(),
        [
            "Repository .git",
            "Repository inner/.git",
            "Repository new/.git"
        ]
    );
    // A second import keeps the guest's changes in these repositories and names them, although it
    // also sends `inner`.
    let head = git(
        &site.guest().join("inner"),
        &site.dir.path().join("guest"),
        &["rev-parse", "HEAD"],
    );
    assert_eq!(
        site.prepare(),
        [".git", "inner/.git", "inner/file", "new/.git", "new/file"]
    );
    assert_eq!(
        git(
            &site.guest().join("inner"),
            &site.dir.path().join("guest"),
            &["rev-parse", "HEAD"]
        ),
        head
    );
    assert_eq!(
        site.left(),
        [
            "Repository .git",
            "Repository inner/.git",
            "Repository new/.git"
        ]
    );
    site.overwrite();
    assert_eq!(site.left(), Vec::<String>::new());
}

#[test]
fn export_repository_made_in_a_tree_without_history_is_named() {
    let site = Site::committed();
    let mut plan = Plan::inspect(&site.host(), &site.options(History::None), &cancel()).unwrap();
    site.prepare_with(&mut plan, false).unwrap();
    assert_eq!(site.left(), Vec::<String>::new());
    guest_repository(&site, ".", true);
    assert_eq!(site.left(), ["Repository .git"]);
}

#[test]
fn second_import_keeps_and_names_a_repository_of_the_guest() {
    let site = Site::committed();
    site.write("dir/kept", "x\n");
    site.prepare();
    site.write_guest("tool/main", "guest\n");
    guest_repository(&site, "tool", true);
    guest_repository(&site, "empty", false);
    site.write_guest("dir2/x", "guest\n");
    guest_repository(&site, "dir2", true);
    // The host adds a file at the path of each repository, and a directory with the same name as
    // one of them.
    site.write("tool", "host\n");
    site.write("empty", "host\n");
    site.write("dir2/x", "host\n");
    site.write("dir2/y", "host\n");
    let kept = [
        "dir2/.git",
        "dir2/x",
        "empty",
        "empty/.git",
        "tool",
        "tool/.git",
        "tool/main",
    ];
    assert_eq!(site.prepare(), kept);
    let there = |name: &str| std::fs::read_to_string(site.guest().join(name)).ok();
    assert_eq!(there("tool/main").unwrap(), "guest\n");
    assert_eq!(there("dir2/x").unwrap(), "guest\n");
    assert_eq!(there("dir2/y").unwrap(), "host\n");
    assert!(
        there("tool/.git/HEAD").is_some()
            && there("empty/.git/HEAD").is_some()
            && there("dir2/.git/HEAD").is_some()
    );
    // A third import keeps the same paths. An import with overwrite keeps none.
    assert_eq!(site.prepare(), kept);
    site.overwrite();
    site.assert_same_tree();
    assert_eq!(site.left(), Vec::<String>::new());
}

#[test]
fn export_files_in_a_submodule_are_named_and_the_rest_applies() {
    let site = Site::committed();
    let inner = Site::committed();
    let url = inner.host();
    for name in ["sub", "un checked", "clean", "plain"] {
        site.git(&[
            "-c",
            "protocol.file.allow=always",
            "submodule",
            "--quiet",
            "add",
            url.to_str().unwrap(),
            name,
        ]);
    }
    site.git(&["commit", "-q", "-m", "submodules"]);
    site.git(&[
        "submodule",
        "--quiet",
        "deinit",
        "-f",
        "un checked",
        "plain",
    ]);
    run(Command::new("git")
        .args(["init", "-q", "own repository"])
        .cwd(site.host()));
    site.write("own repository/a", "x");
    site.prepare();
    assert_eq!(site.left(), Vec::<String>::new());
    // The guest adds or changes files in these directories, and clones two submodules into their
    // paths. `clean` stays a checkout without changes.
    for name in ["sub/a", "sub/new", "own repository/a", "plain/new"] {
        site.write_guest(name, "guest\n");
    }
    for name in ["clean", "un checked"] {
        let into = site.guest().join(name);
        git(
            &site.guest(),
            &site.dir.path().join("guest"),
            &["clone", "-q", url.to_str().unwrap(), into.to_str().unwrap()],
        );
    }
    site.write_guest("a", "one\nguest\n");
    site.write_guest("un checked/a", "guest\n");
    assert_eq!(
        site.left(),
        [
            "Submodule own repository",
            "Submodule sub",
            "Submodule un checked"
        ]
    );
    let (patch, changed) = site.export_patch().unwrap();
    assert_eq!(changed, 2, "{}", String::from_utf8_lossy(&patch));
    site.apply(&site.patch_file()).unwrap();
    assert_eq!(std::fs::read(site.path("a")).unwrap(), b"one\nguest\n");
    assert_eq!(std::fs::read(site.path("plain/new")).unwrap(), b"guest\n");
    assert_eq!(std::fs::read(site.path("sub/a")).unwrap(), b"one\ntwo\n");
    assert_eq!(
        site.prepare(),
        ["own repository", "plain/new", "sub", "un checked"]
    );
    assert_eq!(
        std::fs::read(site.guest().join("sub/new")).unwrap(),
        b"guest\n"
    );
}

#[test]
fn export_replaced_submodule_is_named() {
    let changes: [fn(&Path); 3] = [
        |sub| std::fs::remove_dir_all(sub).unwrap(),
        |sub| {
            std::fs::remove_dir_all(sub).unwrap();
            std::fs::write(sub, "a file").unwrap();
        },
        |sub| {
            std::fs::remove_dir_all(sub).unwrap();
            symlink("dir", sub).unwrap();
        },
    ];
    for change in changes {
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
        site.prepare();
        change(&site.guest().join("sub"));
        assert_eq!(site.left(), ["Submodule sub"]);
        assert_eq!(site.export_patch().unwrap(), (Vec::new(), 0));
    }
}

#[test]
fn export_names_that_git_rejects_are_listed_and_the_rest_applies() {
    let site = Site::committed();
    site.prepare();
    site.write_guest(".GIT/x", "x\n");
    site.write_guest("deep/.Git/y", "y\n");
    site.write_guest("deep/fine", "z\n");
    assert_eq!(site.left(), ["Name .GIT/x", "Name deep/.Git/y"]);
    assert_files_come_back(&site);
}

#[test]
fn export_many_files() {
    let site = Site::committed();
    site.prepare();
    for i in 0..3000 {
        site.write_guest(&format!("svc/{}/{i}", i % 7), format!("{i}\n"));
    }
    guest_repository(&site, "svc", true);
    assert_eq!(site.export_patch().unwrap().1, 3000);
    assert_files_come_back(&site);
}
