//! Tests that all kinds of repositories that git accepts work in a real guest.

use crate::host::{Host, text};
use crate::tree::Site;
use std::fs;

/// Creates a repository with two commits beside the tree, and runs `make` to make the tree from it.
fn derived<'a>(host: &'a Host, name: &str, make: &str) -> Site<'a> {
    let site = Site::unborn(host, "box", name);
    site.on_host(
        "cd ..; rm -r repo; git init -q -b trunk main; cd main; mkdir dir
         echo one > a; echo one > dir/b; git add -A; git commit -qm first
         echo two > a; echo two > dir/b; git commit -qam second
         git config uploadpack.allowFilter true; git config uploadpack.allowAnySHA1InWant true",
    );
    fs::create_dir(site.root()).unwrap();
    site.on_host(&format!("cd ..; rmdir repo; {make}"));
    site
}

/// Makes a commit in the guest and checks the export.
fn commit_in_guest(site: &Site) {
    assert_eq!(site.said_in_guest("git status --porcelain"), "");
    site.in_guest("echo guest >> a; git add a; git commit -qm 'in the guest'");
    assert_eq!(
        site.said_in_guest("git log -2 --format=%s"),
        "in the guest\nsecond\n"
    );
    assert_eq!(site.said_in_guest("git status --porcelain"), "");
    let patch = site.export(&[]).0;
    let patch = String::from_utf8_lossy(&patch);
    assert_eq!(
        patch
            .lines()
            .filter(|l| l.starts_with("diff --git"))
            .count(),
        1,
        "{patch}"
    );
    assert!(patch.contains("+guest"), "{patch}");
}

#[test]
fn all_kinds_of_repositories_work_in_guest() {
    let host = Host::start();
    host.boot("box");

    let partial = derived(
        &host,
        "partial",
        r#"git clone -q --filter=blob:none --sparse "file://$PWD/main" repo; mv main gone"#,
    );
    assert!(partial.prepare().contains("partial clone"));
    assert_eq!(partial.said_in_guest("git ls-files -t dir/b"), "S dir/b\n");
    commit_in_guest(&partial);

    let worktree = derived(
        &host,
        "worktree",
        "git -C main worktree add -q -b wt ../repo",
    );
    worktree.prepare();
    assert_eq!(worktree.said_in_guest("git branch --show-current"), "wt\n");
    commit_in_guest(&worktree);

    let shared = derived(&host, "shared", "git clone -q --shared main repo");
    let out = shared.fcctl(&[
        "workspace",
        "prepare",
        "box",
        ".",
        "--guest-path",
        "/root/shared",
    ]);
    let said = text(&out).1;
    assert_eq!(out.status.code(), Some(2), "{said}");
    let objects = shared.beside("main/.git/objects");
    let flag = format!("--allow-alternate {}", objects.display());
    assert!(said.contains(&flag), "{said}");
    shared.prepare_with(&["--allow-alternate", objects.to_str().unwrap()]);
    commit_in_guest(&shared);

    let latin = derived(&host, "latin", "git clone -q main repo");
    latin.on_host(r#"git checkout -q -b "$(printf 'caf\351')"; git tag "$(printf 't\351')""#);
    latin.prepare();
    assert_eq!(
        latin.in_guest("cat .git/HEAD"),
        b"ref: refs/heads/caf\xe9\n"
    );
    assert!(
        latin
            .in_guest("git for-each-ref --format='%(refname)'")
            .ends_with(b"refs/tags/t\xe9\n")
    );
    commit_in_guest(&latin);

    let removed = derived(&host, "removed", "git clone -q main repo");
    removed.prepare();
    host.ok(&["exec", "box", "-w", "/", "--", "rm", "-r", "/root/removed"]);
    let out = removed.fcctl(&["workspace", "export", "box"]);
    assert_eq!(out.status.code(), Some(3), "{:?}", text(&out));
    assert!(
        text(&out).1.contains("fcctl workspace prepare box PATH"),
        "{:?}",
        text(&out)
    );
    assert!(!removed.prepare().contains("kept"));
    removed.assert_same_tree();
    commit_in_guest(&removed);
}
