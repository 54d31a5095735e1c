//! Tests with a hostile repository that tries to make fcd send another repository of the caller.

mod alternates;
mod worktrees;

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
    /// Creates a hostile tree that is a repository with one commit.
    fn new() -> Self {
        Self::with(Site::committed())
    }

    /// Creates a hostile tree that is an empty directory.
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

    /// Imports the hostile tree, and checks that the guest cannot find the private repository in
    /// it. Returns the error if the import is refused.
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
        // This many `..` reach the root from any directory.
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
    // A link within the tree leads to another link, which leads out of the tree.
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

/// While the repository is read, another process constantly swaps parts of it for links and back.
#[test]
fn parts_swapped_while_git_reads_are_not_sent() {
    use std::sync::atomic::{AtomicBool, Ordering};
    for name in [".git", ".git/objects", ".git/objects/pack"] {
        let heist = Heist::new();
        heist.private.git(&["repack", "-adq"]);
        heist.site.git(&["repack", "-adq"]);
        // The hostile repository knows the ID of the private commit and puts it into a ref.
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
