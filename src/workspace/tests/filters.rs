//! Tests of files with git filters. No filter runs on the host or in the guest.

use super::*;

/// Creates a repository with two filters that leave a mark when they run, and with committed files
/// that the filters cover. Returns the repository and the path of the mark.
fn filtered() -> (Site, PathBuf) {
    let site = Site::unborn();
    let canary = site.dir.path().join("canary");
    for (name, clean) in [("shout", "tr A-Z a-z"), ("crypt-1", "rev")] {
        for (var, command) in [("clean", clean), ("smudge", "tr a-z A-Z")] {
            site.git(&[
                "config",
                &format!("filter.{name}.{var}"),
                &format!("touch {}; {command}", canary.display()),
            ]);
        }
    }
    site.git(&["config", "filter.crypt-1.required", "true"]);
    site.git(&["config", "filter.unused.clean", "false"]);
    site.write(
        ".gitattributes",
        "*.loud filter=shout\nsecret/** filter=crypt-1 -text\n*.none filter=unknown\n",
    );
    for name in [
        "a.loud",
        "odd 'name\n.loud",
        "dir/b.loud",
        "secret/key",
        "secret/--",
        "plain",
        "x.none",
    ] {
        site.write(name, format!("CONTENT of {name}\n"));
    }
    site.write("secret/empty", "");
    site.commit("all");
    age(&site);
    assert_eq!(site.git(&["status", "--porcelain"]), "");
    std::fs::remove_file(&canary).unwrap();
    (site, canary)
}

/// Makes the files older. git rereads files that are as new as its index, and the plan would
/// consider them changed.
fn age(site: &Site) {
    let touch = [
        ".",
        "-name",
        ".git",
        "-prune",
        "-o",
        "-type",
        "f",
        "-exec",
        "touch",
        "-d",
        "1 hour ago",
        "{}",
        "+",
    ];
    run(Command::new("find").args(touch).cwd(site.host()));
    site.git(&["update-index", "--refresh"]);
}

/// Runs git in the guest and returns its status and output.
fn try_guest(site: &Site, args: &[&str]) -> (i32, String) {
    let c = Command::new("git")
        .args(args)
        .cwd(site.guest())
        .env("HOME", site.dir.path().join("guest"));
    let c = c
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_AUTHOR_NAME", "g")
        .env("GIT_AUTHOR_EMAIL", "g@g");
    let output = run_any_status(&c, &cancel(), &mut |_| {}).unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status, String::from_utf8_lossy(&said).into_owned())
}

/// Checks that no object in the guest's repository has this content.
#[track_caller]
fn assert_not_stored(site: &Site, content: &str) {
    std::fs::write(site.dir.path().join("content"), content).unwrap();
    let oid = site.git(&[
        "hash-object",
        "--no-filters",
        site.dir.path().join("content").to_str().unwrap(),
    ]);
    assert_ne!(
        try_guest(site, &["cat-file", "-e", oid.trim()]).0,
        0,
        "the content is in the guest's repository"
    );
}

#[test]
fn filtered_files_are_reported_and_look_unchanged_in_the_guest() {
    let (site, canary) = filtered();
    let mut plan = site.plan().unwrap();
    let text = plan.warnings().join("\n");
    assert!(
        text.contains("crypt-1 (3 files), shout (3 files)") && !text.contains("unused"),
        "{text}"
    );
    site.prepare_with(&mut plan, false).unwrap();
    assert!(!canary.exists(), "a filter ran");
    site.assert_same_tree();
    assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
    assert_eq!(site.git_guest(&["diff", "HEAD"]), "");
    assert_eq!(
        site.git(&["ls-files", "-s"]),
        site.git_guest(&["ls-files", "-s"])
    );
    // The filtered files still look unchanged when git has to read their content.
    for name in ["a.loud", "secret/key"] {
        let bytes = std::fs::read(site.guest().join(name)).unwrap();
        std::fs::remove_file(site.guest().join(name)).unwrap();
        site.write_guest(name, bytes);
    }
    assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
    site.git_guest(&["mv", "a.loud", "moved.loud"]);
    site.git_guest(&["commit", "-q", "-am", "moved"]);
    assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
    assert!(!canary.exists());
}

#[test]
fn filtered_file_cannot_be_committed_in_the_guest() {
    let (site, canary) = filtered();
    site.prepare();
    let secret = "PLAINTEXT of the guest\n";
    for (name, filter) in [
        ("secret/key", "crypt-1"),
        ("a.loud", "shout"),
        ("secret/new", "crypt-1"),
        ("new 'x.loud", "shout"),
    ] {
        let before = std::fs::read(site.guest().join(name)).ok();
        site.write_guest(name, secret);
        for args in [
            &["add", name][..],
            &["add", "-A"],
            &["commit", "-am", "x"],
            &["stash"],
            &["commit", "-m", "x", "--", name],
        ] {
            let (status, said) = try_guest(&site, args);
            // `commit` and `stash` ignore new files.
            let is_new = name.contains("new");
            if !is_new || args[0] == "add" {
                assert_ne!(status, 0, "{name} {args:?}: {said}");
                assert!(
                    said.contains("filter") && (said.contains(filter) || args.len() == 5),
                    "{name} {args:?}: {said}"
                );
            }
            assert_not_stored(&site, secret);
        }
        assert_eq!(
            std::fs::read_to_string(site.guest().join(name)).unwrap(),
            secret
        );
        site.apply(&site.patch_file()).unwrap();
        assert_eq!(std::fs::read_to_string(site.path(name)).unwrap(), secret);
        for path in [site.guest().join(name), site.path(name)] {
            match &before {
                Some(bytes) => std::fs::write(path, bytes).unwrap(),
                None => std::fs::remove_file(path).unwrap(),
            }
        }
    }
    assert_eq!(site.git_guest(&["log", "--format=%s"]), "all\n");
    assert!(!canary.exists());
}

#[test]
fn commit_of_other_files_succeeds_while_a_filtered_file_is_changed() {
    let (site, _) = filtered();
    site.prepare();
    site.write_guest("secret/key", "PLAINTEXT\n");
    site.write_guest("plain", "work\n");
    assert_eq!(
        site.git_guest(&["status", "--porcelain"]),
        " M plain\n M secret/key\n"
    );
    site.git_guest(&["add", "plain"]);
    site.git_guest(&["commit", "-q", "-m", "work"]);
    assert_eq!(
        site.git_guest(&["show", "--stat", "--format=", "HEAD"])
            .lines()
            .count(),
        2
    );
    assert_not_stored(&site, "PLAINTEXT\n");
    // A checkout restores the content that was sent, not the content that git stores.
    let sent = std::fs::read(site.path("secret/key")).unwrap();
    site.git_guest(&["checkout", "-q", "--", "secret/key"]);
    assert_eq!(
        std::fs::read(site.guest().join("secret/key")).unwrap(),
        sent
    );
    assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
    assert_eq!(site.export_patch().unwrap().1, 1);
}

#[test]
fn filtered_file_changed_on_the_host_is_changed_in_the_guest() {
    let (site, canary) = filtered();
    site.write("a.loud", "CHANGED and longer\n");
    site.write("untracked.loud", "NEW\n");
    site.prepare();
    assert!(!canary.exists());
    assert_eq!(
        site.git_guest(&["status", "--porcelain"]),
        " M a.loud\n?? untracked.loud\n"
    );
    site.assert_same_status();
}

#[test]
fn filters_are_removed_when_the_host_has_none() {
    let (site, canary) = filtered();
    site.prepare();
    site.write(".gitattributes", "");
    for name in [
        "a.loud",
        "secret/key",
        "odd 'name\n.loud",
        "dir/b.loud",
        "secret/--",
    ] {
        site.write(name, "new\n");
    }
    site.commit("no filters");
    let _ = std::fs::remove_file(&canary);
    site.prepare();
    assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
    assert!(
        !std::fs::read_to_string(site.guest().join(".git/config"))
            .unwrap()
            .contains("filter")
    );
    site.write_guest("a.loud", "work\n");
    site.git_guest(&["commit", "-q", "-am", "work"]);
    assert!(!canary.exists());
}

#[test]
fn filter_from_the_users_global_attributes_is_honored() {
    let site = Site::committed();
    write(
        &site.dir.path().join("home"),
        ".config/git/attributes",
        "*.ipynb filter=strip\n",
    );
    for (var, command) in [("clean", "tr A-Z a-z"), ("smudge", "cat")] {
        site.git(&[
            "config",
            "--global",
            &format!("filter.strip.{var}"),
            command,
        ]);
    }
    site.write("x.ipynb", "OUTPUT\n");
    site.commit("notebook");
    age(&site);
    assert!(
        site.plan()
            .unwrap()
            .warnings()
            .join("\n")
            .contains("strip (1 file)")
    );
    site.prepare();
    assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
    site.write_guest("y.ipynb", "OUTPUT of the guest\n");
    assert_ne!(try_guest(&site, &["add", "y.ipynb"]).0, 0);
}
