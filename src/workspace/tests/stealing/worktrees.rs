//! Tests with git directories outside the tree: worktrees, `.git` files and separate directories.

use super::super::*;
use super::Heist;
use std::os::unix::fs::symlink;

#[test]
fn git_file_chains_are_refused() {
    // The link leads to another repository, to a file that leads further, or to a directory here
    // whose parts belong to another repository.
    let heist = Heist::bare();
    heist.site.write("fake/HEAD", "ref: refs/heads/trunk\n");
    heist.site.write(
        "fake/commondir",
        format!("{}\n", heist.private(".git").display()),
    );
    heist.site.write(
        "fake/gitdir",
        format!("{}\n", heist.site.path(".git").display()),
    );
    heist.site.write(".git", "gitdir: fake\n");
    heist.refused("commondir");

    let heist = Heist::bare();
    heist.site.write(
        "next",
        format!("gitdir: {}\n", heist.private(".git").display()),
    );
    heist.site.write(".git", "gitdir: next\n");
    heist.refused("");
    let heist = Heist::bare();
    heist.site.write(
        "next",
        format!("gitdir: {}\n", heist.private(".git").display()),
    );
    heist.link(".git", "next");
    heist.refused(&heist.private(".git").display().to_string());
    let heist = Heist::bare();
    heist.link("next", heist.private(".git"));
    heist.site.write(".git", "gitdir: next\n");
    heist.refused(&heist.private(".git").display().to_string());
    // The configuration names this tree, but everything else belongs to another repository.
    let heist = Heist::bare();
    let store = heist.site.dir.path().join("host/store");
    for name in ["HEAD", "objects", "refs"] {
        std::fs::create_dir_all(&store).unwrap();
        symlink(heist.private(&format!(".git/{name}")), store.join(name)).unwrap();
    }
    let text = format!("[core]\n\tworktree = {}\n", heist.site.host().display());
    std::fs::write(store.join("config"), text).unwrap();
    heist
        .site
        .write(".git", format!("gitdir: {}\n", store.display()));
    heist.refused("store/");
}

#[test]
fn worktree_of_another_tree_is_refused() {
    let heist = Heist::bare();
    let tree = heist.private.dir.path().join("host/tree");
    heist
        .private
        .git(&["worktree", "add", "-q", tree.to_str().unwrap()]);
    let gitfile = std::fs::read_to_string(tree.join(".git")).unwrap();
    heist.site.write(".git", &gitfile);
    heist.refused(&tree.display().to_string());
    // This is a copy of the worktree's own directory that points back to this tree.
    let heist_dir = heist.private(".git/worktrees/tree");
    heist
        .site
        .write("fake/HEAD", std::fs::read(heist_dir.join("HEAD")).unwrap());
    heist.site.write(
        "fake/commondir",
        format!("{}\n", heist.private(".git").display()),
    );
    heist.site.write(
        "fake/gitdir",
        format!("{}\n", heist.site.path(".git").display()),
    );
    heist.site.write(".git", "gitdir: fake\n");
    heist.refused("commondir");
    heist.site.write(
        "x/worktrees/y/HEAD",
        std::fs::read(heist_dir.join("HEAD")).unwrap(),
    );
    heist.site.write(
        "x/worktrees/y/gitdir",
        format!("{}\n", heist.site.path(".git").display()),
    );
    heist.site.write(
        "x/worktrees/y/commondir",
        format!("{}\n", heist.private(".git").display()),
    );
    heist.site.write(".git", "gitdir: x/worktrees/y\n");
    heist.refused("commondir");
    // The common directory is in this tree, but its objects are in the other repository.
    heist.site.write("x/worktrees/y/commondir", "../..\n");
    heist.site.write("x/HEAD", "ref: refs/heads/trunk\n");
    for name in ["objects", "refs"] {
        heist.link(&format!("x/{name}"), heist.private(&format!(".git/{name}")));
    }
    heist.refused("x/");
}

#[test]
fn worktree_of_every_nested_kind_is_sent() {
    // These are worktrees of a repository inside the tree, of a submodule, with relative paths, and
    // within the main work tree.
    let site = Site::committed();
    site.git(&["worktree", "add", "-q", "-b", "inner", "inner/tree"]);
    let inner = site.path("inner/tree");
    Plan::inspect(&inner, &site.options(History::Full), &cancel()).unwrap();
    let main = site.path(".git").canonicalize().unwrap();
    std::fs::write(
        main.join("worktrees/tree/gitdir"),
        "../../../inner/tree/.git\n",
    )
    .unwrap();
    std::fs::write(inner.join(".git"), "gitdir: ../../.git/worktrees/tree\n").unwrap();
    Plan::inspect(&inner, &site.options(History::Full), &cancel()).unwrap();
    let module = Site::committed();
    let url = module.host();
    site.git(&[
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "-q",
        "add",
        url.to_str().unwrap(),
        "sub",
    ]);
    let sub = site.path("sub");
    let home = site.dir.path().join("home");
    git(
        &sub,
        &home,
        &["worktree", "add", "-q", "-b", "x", "../of-sub"],
    );
    Plan::inspect(
        &site.path("of-sub"),
        &site.options(History::Full),
        &cancel(),
    )
    .unwrap();
    git(&sub, &home, &["sparse-checkout", "set", "dir"]);
    Plan::inspect(&sub, &site.options(History::Full), &cancel()).unwrap();
}

#[test]
fn repository_with_a_separate_git_dir_is_sent_when_allowed() {
    let site = Site::plain();
    let store = site.dir.path().join("store.git");
    site.git(&[
        "init",
        "-q",
        &format!("--separate-git-dir={}", store.display()),
    ]);
    let e = site.plan().err().unwrap();
    let hint = e.hint_text().unwrap().to_owned();
    assert!(
        hint.ends_with(&format!("--allow-alternate {}", store.display())),
        "{hint}"
    );
    let options = Options {
        allow_alternates: vec![store],
        ..site.options(History::Full)
    };
    Plan::inspect(&site.host(), &options, &cancel()).unwrap();
}

/// Runs the hint's command exactly as it is printed.
#[test]
fn moved_worktree_is_repaired_by_the_hinted_command() {
    let site = Site::committed();
    let home = site.dir.path().join("home");
    let (old, new) = (
        site.dir.path().join("host/m2"),
        site.dir.path().join("host/it's moved"),
    );
    site.git(&["worktree", "add", "-q", "-b", "wt", old.to_str().unwrap()]);
    let config = std::fs::read(site.path(".git/config")).unwrap();
    run(Command::new("cp").arg("-a").args([&old, &new]));
    // A copy must not detach the original worktree.
    let e = Plan::inspect(&new, &site.options(History::Full), &cancel())
        .err()
        .unwrap();
    assert!(!e.hint_text().unwrap().contains("repair"), "{e:?}");
    std::fs::remove_dir_all(&old).unwrap();
    let e = Plan::inspect(&new, &site.options(History::Full), &cancel())
        .err()
        .unwrap();
    let hint = e.hint_text().unwrap().to_owned();
    let line = hint.split_once("run: ").unwrap().1;
    assert!(
        line.starts_with("git -C ") && line.ends_with(" worktree repair"),
        "{line}"
    );
    run(Command::new("sh").args(["-c", line]).env("HOME", &home));
    Plan::inspect(&new, &site.options(History::Full), &cancel()).unwrap();
    assert_eq!(site.git(&["status", "--porcelain"]), "");
    assert_eq!(std::fs::read(site.path(".git/config")).unwrap(), config);
    // The main repository was moved.
    let moved = site.dir.path().join("host/main");
    std::fs::rename(site.host(), &moved).unwrap();
    let e = Plan::inspect(&new, &site.options(History::Full), &cancel())
        .err()
        .unwrap();
    let hint = e
        .hint_text()
        .unwrap()
        .replace("MAIN", &moved.display().to_string());
    run(Command::new("sh")
        .args(["-c", hint.split_once("run: ").unwrap().1])
        .env("HOME", &home));
    Plan::inspect(&new, &site.options(History::Full), &cancel()).unwrap();
}
