//! A hostile repository tries to get another repository of the caller's sent.

use super::*;
use crate::error::Kind;
use std::os::unix::fs::symlink;

const SECRET: &str = "the private repository's secret\n";

/// A private repository, and a directory for a hostile tree.
struct Heist {
    private: Site,
    site: Site,
}

impl Heist {
    /// The hostile tree is a repository with one commit of its own.
    fn new() -> Self {
        Self::with(Site::committed())
    }

    /// The hostile tree is an empty directory.
    fn bare() -> Self {
        Self::with(Site::plain())
    }

    fn with(site: Site) -> Self {
        let private = Site::committed();
        private.write("secret", SECRET);
        private.commit("the secret");
        Self { private, site }
    }

    fn private(&self, below: &str) -> PathBuf {
        self.private.path(below)
    }

    /// Replaces a path of the hostile tree with a link.
    fn link(&self, below: &str, target: impl AsRef<Path>) {
        let path = self.site.path(below);
        let _ = std::fs::remove_dir_all(&path);
        let _ = std::fs::remove_file(&path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    /// Sends what can be sent and searches it for the private repository, as the guest could.
    /// Returns the refusal.
    #[track_caller]
    fn run(&self) -> Option<Error> {
        self.run_with(&self.site.options(History::Full))
    }

    #[track_caller]
    fn run_with(&self, options: &Options) -> Option<Error> {
        let mut plan = match Plan::inspect(&self.site.host(), options, &cancel()) {
            Ok(plan) => plan,
            Err(e) => return Some(e),
        };
        let sent = self.site.prepare_with(&mut plan, false);
        assert!(
            !self.shows_secret(),
            "the guest can git show the private repository"
        );
        sent.err()
    }

    fn shows_secret(&self) -> bool {
        let name = self.private.git(&["rev-parse", "HEAD:secret"]);
        let commit = self.private.git(&["rev-parse", "HEAD"]);
        let guest = self.site.guest();
        let show = |what: &str| {
            let home = self.site.dir.path().join("guest");
            let c = Command::new("git")
                .args(["show", what])
                .cwd(&guest)
                .env("HOME", home);
            let output = run_any_status(&c, &cancel(), &mut |_| {}).unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            output.status == 0 && (text.contains(SECRET.trim()) || text.contains("the secret"))
        };
        let in_git = guest.join(".git").is_dir() && (show(name.trim()) || show(commit.trim()));
        let listed = guest.is_dir() && self.in_index(&guest);
        in_git
            || listed
            || listing(&guest)
                .values()
                .any(|(_, text)| text == SECRET.as_bytes())
    }

    /// True if the guest's index has a name from the private repository.
    fn in_index(&self, guest: &Path) -> bool {
        let c = Command::new("git").args(["ls-files"]).cwd(guest);
        let output = run_any_status(&c, &cancel(), &mut |_| {}).unwrap();
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .any(|l| l == "secret")
    }

    #[track_caller]
    fn refused(&self, word: &str) {
        let e = self.run().expect("refused");
        assert_eq!(e.kind(), Kind::InvalidTree, "{e}");
        assert!(e.to_string().contains(word), "{word:?} is not in: {e}");
        assert!(!e.to_string().contains(SECRET.trim()), "{e}");
        assert!(e.hint_text().is_some(), "{e}");
    }
}

#[test]
fn commondir_of_another_repository_is_refused() {
    for absolute in [true, false] {
        let heist = Heist::bare();
        let main = heist.private(".git").display().to_string();
        // This number of `..` reaches the root from any directory.
        let up = if absolute {
            String::new()
        } else {
            "..".to_owned() + &"/..".repeat(30)
        };
        heist.site.write(".git/commondir", format!("{up}{main}\n"));
        heist.site.write(".git/HEAD", "ref: refs/heads/trunk\n");
        heist.refused("commondir");
    }
}

#[test]
fn links_from_git_directory_to_another_repository_are_refused() {
    for name in [
        "objects",
        "refs",
        "info",
        "HEAD",
        "packed-refs",
        "shallow",
        "index",
        "config",
    ] {
        let heist = Heist::new();
        heist.private.git(&["pack-refs", "--all"]);
        heist
            .private
            .write(".git/shallow", heist.private.git(&["rev-parse", "HEAD"]));
        heist.private.write(".git/info/exclude", "secret\n");
        heist.link(
            &format!(".git/{name}"),
            heist.private(&format!(".git/{name}")),
        );
        heist.refused(&format!(".git/{name}"));
    }
    let heist = Heist::new();
    std::fs::create_dir_all(heist.private(".git/modules/x")).unwrap();
    heist.link(".git/modules", heist.private(".git/modules"));
    heist.refused(".git/modules");
}

#[test]
fn links_deep_in_objects_and_refs_are_refused() {
    let heist = Heist::new();
    heist.private.git(&["repack", "-adq"]);
    heist.link(".git/objects/pack", heist.private(".git/objects/pack"));
    heist.site.write(
        ".git/refs/heads/trunk",
        heist.private.git(&["rev-parse", "HEAD"]),
    );
    heist.refused("objects/pack");

    let heist = Heist::new();
    heist.private.git(&["repack", "-adq"]);
    std::fs::create_dir_all(heist.site.path(".git/objects/pack")).unwrap();
    for item in std::fs::read_dir(heist.private(".git/objects/pack")).unwrap() {
        let item = item.unwrap();
        symlink(
            item.path(),
            heist.site.path(".git/objects/pack").join(item.file_name()),
        )
        .unwrap();
    }
    heist.site.write(
        ".git/refs/heads/trunk",
        heist.private.git(&["rev-parse", "HEAD"]),
    );
    heist.refused("objects/pack/pack-");

    let heist = Heist::new();
    let objects = heist.private(".git/objects");
    for item in std::fs::read_dir(&objects).unwrap() {
        let name = item.unwrap().file_name().into_string().unwrap();
        let ours = heist.site.path(format!(".git/objects/{name}"));
        if name.len() == 2 && !ours.exists() {
            symlink(objects.join(&name), ours).unwrap();
        }
    }
    heist.site.write(
        ".git/refs/heads/trunk",
        heist.private.git(&["rev-parse", "HEAD"]),
    );
    heist.refused("objects/");

    let heist = Heist::new();
    heist.link(
        ".git/refs/heads/trunk",
        heist.private(".git/refs/heads/trunk"),
    );
    heist.refused("refs/heads/trunk");
    // A link within the tree that leads to a link out of it.
    let heist = Heist::new();
    heist.link("store", heist.private(".git/objects"));
    heist.link(".git/objects", heist.site.path("store"));
    heist.refused(".git/objects");
    let heist = Heist::new();
    heist.site.write("objects/readme", "inside the tree\n");
    heist.link(".git/objects", heist.site.path("objects"));
    heist.link("objects/pack", heist.private(".git/objects/pack"));
    heist.refused("objects/pack");
}

#[test]
fn alternate_of_another_repository_is_refused() {
    let check = |text: &dyn Fn(&Heist) -> String| {
        let heist = Heist::new();
        heist.site.write(
            ".git/refs/heads/trunk",
            heist.private.git(&["rev-parse", "HEAD"]),
        );
        heist
            .site
            .write(".git/objects/info/alternates", text(&heist));
        heist.refused(&heist.private(".git/objects").display().to_string());
        let hint = heist.run().unwrap().hint_text().unwrap().to_owned();
        assert!(hint.contains("--allow-alternate"), "{hint}");
    };
    let objects = |heist: &Heist| heist.private(".git/objects").display().to_string();
    check(&|h| format!("{}\n", objects(h)));
    check(&|h| objects(h));
    check(&|h| format!("# a comment\n/not/there\n\n{}//.//\n", objects(h)));
    check(&|h| format!("..{}{}\n", "/..".repeat(30), objects(h)));
    check(&|h| format!("\"{}\"\n", objects(h)));
    check(&|h| format!("\"{}\"\n", objects(h).replacen('t', "\\164", 1)));
    // A quoted path followed by another byte, which git accepts.
    check(&|h| format!("\"/not/there\"x{}\n", objects(h)));
    check(&|h| format!("\"{}\"x\n", objects(h)));
}

#[test]
fn nested_alternate_of_another_repository_is_refused() {
    // A store inside the tree belongs to the tree, but its own alternate belongs to another
    // repository.
    let heist = Heist::new();
    heist.site.write(
        "store/info/alternates",
        format!("{}\n", heist.private(".git/objects").display()),
    );
    heist
        .site
        .write(".git/objects/info/alternates", "../../store\n");
    heist.site.write(
        ".git/refs/heads/trunk",
        heist.private.git(&["rev-parse", "HEAD"]),
    );
    heist.refused(&heist.private(".git/objects").display().to_string());
    // The directory or the file itself is a link.
    let heist = Heist::new();
    heist.link(".git/objects/info", heist.private(".git/objects/info"));
    heist.refused("objects/info");
    let heist = Heist::new();
    heist.site.write(
        "list",
        format!("{}\n", heist.private(".git/objects").display()),
    );
    heist.link(".git/objects/info/alternates", heist.site.path("list"));
    heist.refused(&heist.private(".git/objects").display().to_string());
}

#[test]
fn http_alternates_are_not_followed() {
    let heist = Heist::new();
    let text = format!("{}\n", heist.private(".git/objects").display());
    heist.site.write(".git/objects/info/http-alternates", text);
    assert!(heist.run().is_none());
}

#[test]
fn pack_named_by_multi_pack_index_outside_is_not_used() {
    // A multi-pack index names packs by file name, and git does not check the names.
    let heist = Heist::new();
    heist.private.git(&["repack", "-adq"]);
    heist.private.git(&["multi-pack-index", "write"]);
    let packs = heist.private(".git/objects/pack");
    let midx = std::fs::read(packs.join("multi-pack-index")).unwrap();
    assert!(!midx.is_empty());
    let at = midx.windows(5).position(|w| w == b"pack-").unwrap();
    let name = String::from_utf8(midx[at..at + 49].to_vec()).unwrap();
    assert!(name.ends_with(".idx"), "{name}");
    // The name has the same length, so that all offsets stay valid.
    let short = heist.site.dir.path().join("host/p");
    symlink(&packs, &short).unwrap();
    let way = format!("../../../../p/{name}");
    let grow = (way.len() - name.len()).next_multiple_of(4);
    let forged = forge_midx(&midx, at, &name, &way, grow);
    heist
        .site
        .write(".git/objects/pack/multi-pack-index", forged);
    heist.site.write(
        ".git/refs/heads/trunk",
        heist.private.git(&["rev-parse", "HEAD"]),
    );
    // git itself must be deceived, or this test proves nothing.
    assert!(
        heist
            .site
            .git(&["show", "HEAD:secret"])
            .contains(SECRET.trim())
    );
    assert!(heist.run().is_some());
}

/// Replaces the only name in the PNAM chunk with a longer one. git does not verify the file's
/// checksum.
fn forge_midx(midx: &[u8], at: usize, name: &str, way: &str, grow: usize) -> Vec<u8> {
    let end = at + name.len() + 1;
    let padded = end.next_multiple_of(4).max(end);
    let mut new = way.as_bytes().to_vec();
    let old_size = (padded - at).max(end - at);
    new.resize(old_size + grow, 0);
    let mut out = [&midx[..at], &new, &midx[at + old_size..]].concat();
    // The table of chunks holds an id and an offset for each.
    let chunks = midx[6] as usize;
    for i in 0..=chunks {
        let entry = 12 + 12 * i + 4;
        let offset = u64::from_be_bytes(out[entry..entry + 8].try_into().unwrap());
        if offset > at as u64 {
            out[entry..entry + 8].copy_from_slice(&(offset + grow as u64).to_be_bytes());
        }
    }
    out
}

#[test]
fn git_file_chains_are_refused() {
    // The link leads to another repository, to a file that leads further, or to a directory here
    // whose parts are there.
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
    // The configuration claims the tree, and everything else belongs to another repository.
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
    // A copy of the worktree's own directory that points back to this tree.
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
    // Its common directory is here, but its objects are there.
    heist.site.write("x/worktrees/y/commondir", "../..\n");
    heist.site.write("x/HEAD", "ref: refs/heads/trunk\n");
    for name in ["objects", "refs"] {
        heist.link(&format!("x/{name}"), heist.private(&format!(".git/{name}")));
    }
    heist.refused("x/");
}

#[test]
fn settings_from_an_included_file_are_not_sent() {
    let heist = Heist::new();
    heist.private.git(&["config", "user.name", "private name"]);
    heist.private.git(&["config", "core.eol", "crlf"]);
    heist.site.git(&[
        "config",
        "include.path",
        heist.private(".git/config").to_str().unwrap(),
    ]);
    assert!(heist.run().is_none());
    let config = std::fs::read_to_string(heist.site.guest().join(".git/config")).unwrap();
    assert!(
        !config.contains("private name") && !config.contains("crlf"),
        "{config}"
    );
    // An included file inside the tree belongs to the tree.
    let site = Site::committed();
    site.write(".gitconfig", "[user]\n\tname = T Ree\n");
    site.git(&["config", "include.path", "../.gitconfig"]);
    site.prepare();
    assert_eq!(site.git_guest(&["config", "user.name"]), "T Ree\n");
}

#[test]
fn broken_repository_does_not_fall_back_to_one_above() {
    let heist = Heist::new();
    let inner = heist.private("inner");
    std::fs::create_dir_all(inner.join(".git")).unwrap();
    std::fs::write(inner.join("file"), "x").unwrap();
    let e = Plan::inspect(&inner, &heist.site.options(History::Full), &cancel())
        .err()
        .unwrap();
    assert_eq!(e.kind(), Kind::InvalidTree);
    assert!(e.to_string().contains("inner"), "{e}");
}

#[test]
fn submodule_of_another_repository_is_not_sent() {
    let heist = Heist::new();
    heist.site.write(
        "sub/.git",
        format!("gitdir: {}\n", heist.private(".git").display()),
    );
    let commit = heist.private.git(&["rev-parse", "HEAD"]);
    heist.site.git(&[
        "update-index",
        "--add",
        "--cacheinfo",
        &format!("160000,{},sub", commit.trim()),
    ]);
    assert!(heist.run().is_none());
    let untracked = Heist::new();
    untracked.site.write(
        "sub/.git",
        format!("gitdir: {}\n", untracked.private(".git").display()),
    );
    untracked.site.write("sub/x", "x");
    assert!(untracked.run().is_none());
}

/// A repository that has only what another one has.
fn shared_clone(heist: &Heist) -> PathBuf {
    let main = heist.private.host();
    let site = &heist.site;
    std::fs::remove_dir_all(site.host()).unwrap();
    let into = site.host();
    let args = [
        "clone",
        "-q",
        "--shared",
        main.to_str().unwrap(),
        into.to_str().unwrap(),
    ];
    git(&main, &site.dir.path().join("home"), &args);
    main.join(".git/objects")
}

#[test]
fn shared_clone_is_sent_when_its_alternate_is_allowed() {
    let heist = Heist::bare();
    let objects = shared_clone(&heist);
    let e = heist.run().expect("refused");
    let hint = e.hint_text().unwrap();
    assert!(
        hint.contains(&format!("--allow-alternate {}", objects.display())),
        "{hint}"
    );
    assert!(
        e.to_string().contains(".git/objects/info/alternates"),
        "{e}"
    );
    // Allowing the store, its repository or a link to it all works.
    let link = heist.site.dir.path().join("link");
    symlink(heist.private.host(), &link).unwrap();
    for allowed in [objects.clone(), heist.private.host(), link] {
        let site = Site::plain();
        let options = Options {
            allow_alternates: vec![allowed],
            ..heist.site.options(History::Full)
        };
        let mut plan = Plan::inspect(&heist.site.host(), &options, &cancel()).unwrap();
        site.prepare_with(&mut plan, false).unwrap();
        assert_eq!(site.git_guest(&["show", "HEAD:secret"]), SECRET);
        assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
        site.git_guest(&["fsck"]);
    }
    // Allowing another directory does not help, and neither does one that does not exist.
    let check = |allowed: PathBuf, kind: Kind| {
        let options = Options {
            allow_alternates: vec![allowed],
            ..heist.site.options(History::Full)
        };
        assert_eq!(heist.run_with(&options).unwrap().kind(), kind);
    };
    check(heist.private.path("dir"), Kind::InvalidTree);
    check(heist.private.path("no-such"), Kind::PathNotFound);
}

#[test]
fn alternate_of_an_allowed_store_must_be_allowed_too() {
    let heist = Heist::bare();
    let objects = shared_clone(&heist);
    let third = Site::committed();
    let list = objects.join("info/alternates");
    std::fs::write(&list, format!("{}\n", third.path(".git/objects").display())).unwrap();
    let options = |allowed: &[&Path]| Options {
        allow_alternates: allowed.iter().map(|p| p.to_path_buf()).collect(),
        ..heist.site.options(History::Full)
    };
    let e = Plan::inspect(&heist.site.host(), &options(&[&objects]), &cancel())
        .err()
        .unwrap();
    assert!(
        e.to_string().contains(&third.host().display().to_string()),
        "{e}"
    );
    Plan::inspect(
        &heist.site.host(),
        &options(&[&objects, &third.host()]),
        &cancel(),
    )
    .unwrap();
    // An allowed path does not give access to others.
    std::fs::remove_file(&list).unwrap();
    std::fs::remove_dir_all(objects.join("pack")).unwrap();
    symlink(third.path(".git/objects/pack"), objects.join("pack")).unwrap();
    let e = Plan::inspect(&heist.site.host(), &options(&[&objects]), &cancel())
        .err()
        .unwrap();
    assert!(e.to_string().contains("objects/pack"), "{e}");
}

#[test]
fn alternate_of_another_owner_is_refused_without_the_flag() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: only root can make files of another owner");
        return;
    }
    let heist = Heist::bare();
    let objects = shared_clone(&heist);
    run(Command::new("chown")
        .args(["-R", "65534"])
        .arg(heist.private.host()));
    assert_eq!(heist.run().unwrap().kind(), Kind::InvalidTree);
    let options = Options {
        allow_alternates: vec![objects],
        ..heist.site.options(History::Full)
    };
    Plan::inspect(&heist.site.host(), &options, &cancel()).unwrap();
}

#[test]
fn worktree_of_every_nested_kind_is_sent() {
    // Worktrees of a repository inside the tree, of a submodule, with relative paths, and within
    // the main work tree.
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

/// Runs the hint exactly as it is printed.
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

/// Another process swaps parts of the repository for links and back as fast as possible while it is
/// read.
#[test]
fn parts_swapped_while_git_reads_are_not_sent() {
    use std::sync::atomic::{AtomicBool, Ordering};
    for name in [".git", ".git/objects", ".git/objects/pack"] {
        let heist = Heist::new();
        heist.private.git(&["repack", "-adq"]);
        heist.site.git(&["repack", "-adq"]);
        // The hostile repository knows the name of the private commit and puts it into a ref.
        heist.site.write(
            ".git/refs/heads/trunk",
            heist.private.git(&["rev-parse", "HEAD"]),
        );
        let (path, aside) = (heist.site.path(name), heist.site.dir.path().join("aside"));
        let link = heist.site.dir.path().join("link");
        symlink(heist.private(name), &link).unwrap();
        let ended = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    std::fs::rename(&path, &aside).unwrap();
                    std::fs::rename(&link, &path).unwrap();
                    std::thread::yield_now();
                    std::fs::rename(&path, &link).unwrap();
                    std::fs::rename(&aside, &path).unwrap();
                }
            });
            let leaked = (0..20).any(|_| {
                let Ok(mut plan) = Plan::inspect(
                    &heist.site.host(),
                    &heist.site.options(History::Full),
                    &cancel(),
                ) else {
                    return false;
                };
                heist.site.prepare_with(&mut plan, false).is_ok() && heist.shows_secret()
            });
            ended.store(true, Ordering::Relaxed);
            assert!(
                !leaked,
                "{name}: the guest can git show the private repository"
            );
        });
    }
}
