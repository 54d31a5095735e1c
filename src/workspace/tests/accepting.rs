//! Tests of repositories that git accepts, and of the warnings about files that are not sent.

use super::*;
use crate::error::Kind;
use std::ffi::OsString;

#[test]
fn safe_directory_is_honored_wherever_git_reads_it() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: only root can make files of another owner");
        return;
    }
    let site = Site::committed();
    run(Command::new("chown").args(["-R", "65534"]).arg(site.host()));
    let mut options = site.options(History::default());
    options.env.home = Some(site.dir.path().to_owned());
    let inspect = |options: &Options| Plan::inspect(&site.host(), options, &cancel()).map(drop);
    assert_eq!(inspect(&options).unwrap_err().kind(), Kind::InvalidTree);
    let config = |text: &str| std::fs::write(site.dir.path().join(".gitconfig"), text).unwrap();
    config("[safe]\n\tdirectory = ~/host/repo\n");
    inspect(&options).unwrap();
    config("[safe]\n\tdirectory = ~/host/*\n");
    inspect(&options).unwrap();
    // An empty value resets the list of safe directories.
    config("[safe]\n\tdirectory = ~/host/repo\n\tdirectory =\n");
    assert_eq!(inspect(&options).unwrap_err().kind(), Kind::InvalidTree);
    config("");
    for value in [
        "*".to_owned(),
        site.host().display().to_string(),
        "~/host/repo".to_owned(),
    ] {
        let vars = [
            ("GIT_CONFIG_COUNT", "1"),
            ("GIT_CONFIG_KEY_0", "safe.directory"),
            ("GIT_CONFIG_VALUE_0", &value),
        ];
        let vars = vars.map(|(k, v)| (OsString::from(k), OsString::from(v)));
        let env = CallerEnv {
            home: options.env.home.clone(),
            ..CallerEnv::from_vars(vars)
        };
        let env = CallerEnv {
            path: options.env.path.clone(),
            ..env
        };
        inspect(&Options {
            env,
            ..options.clone()
        })
        .unwrap();
    }
    // The repository must not be able to declare itself safe.
    run(Command::new("git")
        .args(["config", "--file", ".git/config", "safe.directory", "*"])
        .cwd(site.host()));
    assert_eq!(inspect(&options).unwrap_err().kind(), Kind::InvalidTree);
}

/// git's own variables can name other repositories. None of them may affect what is sent.
#[test]
fn git_variables_that_name_a_repository_are_ignored() {
    let (private, site) = (Site::committed(), Site::committed());
    private.commit_as("the secret");
    let vars = [
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_COMMON_DIR",
    ];
    let mut vars: Vec<_> = vars
        .map(|k| (OsString::from(k), private.path(".git").into_os_string()))
        .into();
    let objects = private.path(".git/objects").into_os_string();
    vars.push(("GIT_ALTERNATE_OBJECT_DIRECTORIES".into(), objects));
    vars.push(("GIT_NAMESPACE".into(), "x".into()));
    let base = site.options(History::Full);
    let env = CallerEnv {
        path: base.env.path.clone(),
        home: base.env.home.clone(),
        ..CallerEnv::from_vars(vars)
    };
    let mut plan = Plan::inspect(&site.host(), &Options { env, ..base }, &cancel()).unwrap();
    site.prepare_with(&mut plan, false).unwrap();
    assert_eq!(site.git_guest(&["log", "--all", "--format=%s"]), "first\n");
    let commit = private.git(&["rev-parse", "HEAD"]);
    let c = Command::new("git")
        .args(["cat-file", "-e", commit.trim()])
        .cwd(site.guest());
    assert_ne!(
        run_any_status(&c, &cancel(), &mut |_| {}).unwrap().status,
        0
    );
}

#[test]
fn identity_from_environment_is_used_in_guest() {
    let site = Site::committed();
    std::fs::write(site.dir.path().join("home/.gitconfig"), "").unwrap();
    let vars = [
        ("GIT_AUTHOR_NAME", "A \"U\" Thor"),
        ("GIT_AUTHOR_EMAIL", "author@example.org"),
        ("GIT_COMMITTER_NAME", "C Mitter"),
        ("GIT_COMMITTER_EMAIL", "committer@example.org"),
    ];
    let vars = vars.map(|(k, v)| (OsString::from(k), OsString::from(v)));
    let base = site.options(History::default());
    let env = CallerEnv {
        path: base.env.path.clone(),
        home: base.env.home.clone(),
        ..CallerEnv::from_vars(vars)
    };
    let mut plan = Plan::inspect(
        &site.host(),
        &Options {
            env,
            ..base.clone()
        },
        &cancel(),
    )
    .unwrap();
    site.prepare_with(&mut plan, false).unwrap();
    site.git_guest(&["commit", "-q", "--allow-empty", "-m", "in the guest"]);
    let said = site.git_guest(&["log", "-1", "--format=%an <%ae> %cn <%ce>"]);
    assert_eq!(
        said,
        "A \"U\" Thor <author@example.org> C Mitter <committer@example.org>\n"
    );

    // Author and committer come from the settings, and the missing address from EMAIL.
    let other = Site::committed();
    let text = "[user]\n\tname = U Ser\n[author]\n\temail = a@example.org\n";
    std::fs::write(other.dir.path().join("home/.gitconfig"), text).unwrap();
    let base = other.options(History::default());
    let vars = [(OsString::from("EMAIL"), OsString::from("e@example.org"))];
    let env = CallerEnv {
        path: base.env.path.clone(),
        home: base.env.home.clone(),
        ..CallerEnv::from_vars(vars)
    };
    let mut plan = Plan::inspect(
        &other.host(),
        &Options {
            env,
            ..base.clone()
        },
        &cancel(),
    )
    .unwrap();
    other.prepare_with(&mut plan, false).unwrap();
    other.git_guest(&["commit", "-q", "--allow-empty", "-m", "in the guest"]);
    let said = other.git_guest(&["log", "-1", "--format=%an <%ae> %cn <%ce>"]);
    assert_eq!(said, "U Ser <a@example.org> U Ser <e@example.org>\n");
}

#[test]
fn branch_and_tag_names_in_latin_1_arrive() {
    let site = Site::committed();
    let git_raw = |args: &[&[u8]]| {
        let c = Command::new("git")
            .args(args.iter().map(|a| OsStr::from_bytes(a)))
            .cwd(site.host());
        run(c.env("HOME", site.dir.path().join("home")));
    };
    git_raw(&[b"checkout", b"-q", b"-b", b"caf\xe9"]);
    git_raw(&[b"tag", b"t\xe9"]);
    git_raw(&[b"tag", b"-a", b"-m", b"x", b"v\xe9/1"]);
    site.prepare();
    let head = std::fs::read(site.guest().join(".git/HEAD")).unwrap();
    assert_eq!(head, b"ref: refs/heads/caf\xe9\n");
    let refs = run(Command::new("git")
        .args(["for-each-ref", "--format=%(refname)"])
        .cwd(site.guest()))
    .stdout;
    assert_eq!(
        refs,
        b"refs/heads/caf\xe9\nrefs/tags/t\xe9\nrefs/tags/v\xe9/1\n"
    );
    site.git_guest(&["commit", "-q", "--allow-empty", "-m", "in the guest"]);
    site.write("a", "changed\n");
    assert_eq!(site.prepare(), [".git/HEAD"]);
}

#[test]
fn operations_in_progress_are_reported() {
    let site = Site::committed();
    let base = site.git(&["rev-parse", "HEAD"]).trim().to_owned();
    site.write("a", "theirs\n");
    site.commit("theirs");
    site.git(&["branch", "theirs"]);
    site.git(&["reset", "-q", "--hard", &base]);
    site.write("a", "ours\n");
    site.commit("ours");
    site.git(&["branch", "ours"]);
    let conflicts = |args: &[&str]| {
        let c = Command::new("git")
            .args(args)
            .cwd(site.host())
            .env("HOME", site.dir.path().join("home"));
        assert_ne!(
            run_any_status(&c, &cancel(), &mut |_| {}).unwrap().status,
            0,
            "{args:?}"
        );
    };
    let said = |word: &str| {
        let warnings = site.plan().unwrap().warnings().join("\n");
        assert!(
            warnings.contains(&format!("{word} is in progress here")),
            "{word:?}: {warnings}"
        );
        site.git(&["reset", "-q", "--hard", "ours"]);
    };
    assert_eq!(site.plan().unwrap().warnings(), [""; 0]);
    conflicts(&["merge", "theirs"]);
    said("a merge");
    conflicts(&["cherry-pick", "theirs"]);
    said("a cherry-pick");
    conflicts(&["revert", "--no-edit", &base]);
    said("a revert");
    conflicts(&["rebase", "theirs"]);
    said("a rebase");
    site.git(&["rebase", "--abort"]);
    conflicts(&["rebase", "--apply", "theirs"]);
    said("a rebase");
    site.git(&["rebase", "--abort"]);
    site.git(&["bisect", "start", "-q"]);
    said("a bisection");
    // Without history there is nothing to finish in the guest, so nothing is reported.
    let options = site.options(History::None);
    assert_eq!(
        Plan::inspect(&site.host(), &options, &cancel())
            .unwrap()
            .warnings(),
        [""; 0]
    );
}

#[test]
fn workspace_removed_in_the_guest_is_sent_again() {
    let git_tree = Site::committed();
    let plain = Site::plain();
    plain.write("a", "x");
    plain.write("dir/b", "x");
    for site in [&git_tree, &plain] {
        site.prepare();
        site.write_guest("a", "changed in the guest\n");
        std::fs::remove_dir_all(site.guest()).unwrap();
        let e = site.export_patch().unwrap_err();
        assert_eq!(e.kind(), Kind::WorkspaceNotFound);
        assert!(
            e.hint_text()
                .unwrap()
                .contains("fcctl workspace prepare {vm}"),
            "{e:?}"
        );
        assert_eq!(site.prepare(), [""; 0]);
        site.assert_same_tree();
        assert_eq!(export(site).1, 0);
        site.write_guest("new", "x");
        assert_eq!(export(site).1, 1);
    }
    git_tree.assert_same_status_without("new");
    // The guest replaces its workspace with an empty directory.
    std::fs::remove_dir_all(git_tree.guest()).unwrap();
    std::fs::create_dir(git_tree.guest()).unwrap();
    assert_eq!(git_tree.prepare(), [""; 0]);
    git_tree.assert_same_tree();
    git_tree.assert_same_status();
    // Unlike an emptied workspace, a single deleted file counts as a change by the guest.
    std::fs::remove_file(git_tree.guest().join("a")).unwrap();
    assert_eq!(git_tree.prepare(), ["a"]);
    assert!(!git_tree.guest().join("a").exists());
}

fn export(site: &Site) -> (String, usize) {
    let patch = String::from_utf8_lossy(&site.export_patch().unwrap().0).into_owned();
    let changed = patch
        .lines()
        .filter(|l| l.starts_with("diff --git "))
        .count();
    (patch, changed)
}

#[test]
fn names_like_git_directories_are_left_out_with_a_warning() {
    let site = Site::committed();
    site.write(".GIT/x", "x");
    site.write("sub/.Git/y", "y");
    site.write("dir/.gIT", "z");
    site.write("a.git/ok", "ok");
    let warnings = site.plan().unwrap().warnings().join("\n");
    for name in [".GIT", "sub/.Git", "dir/.gIT"] {
        assert!(
            warnings.contains(&format!("left out {name}: git does not allow such a name")),
            "{name}: {warnings}"
        );
    }
    site.prepare();
    assert!(!site.guest().join(".GIT").exists() && !site.guest().join("sub").exists());
    assert!(!site.guest().join("dir/.gIT").exists() && site.guest().join("a.git/ok").exists());

    let plain = Site::plain();
    plain.write("in/.Git/x", "x");
    plain.write("x", "x");
    let warnings = plain.plan().unwrap().warnings().join("\n");
    assert!(
        warnings.contains("in/.Git is sent, but is never part of an exported patch or tree"),
        "{warnings}"
    );
    plain.prepare();
    assert!(plain.guest().join("in/.Git/x").exists());
}

/// Creates a repository with two commits and a partial clone of it. Returns both. With `sparse`,
/// only the clone's top-level files are checked out.
fn partial_clone(filter: &str, sparse: bool) -> (Site, Site) {
    let origin = Site::committed();
    origin.git(&["config", "uploadpack.allowFilter", "true"]);
    origin.git(&["config", "uploadpack.allowAnySHA1InWant", "true"]);
    origin.write("dir/b", "changed\n");
    origin.write("a", "second\n");
    origin.commit("second");
    let site = Site::plain();
    std::fs::copy(
        origin.dir.path().join("home/.gitconfig"),
        site.dir.path().join("home/.gitconfig"),
    )
    .unwrap();
    std::fs::remove_dir(site.host()).unwrap();
    let (url, into) = (format!("file://{}", origin.host().display()), site.host());
    let mut args = vec!["clone", "-q", filter];
    args.extend(sparse.then_some("--sparse"));
    args.extend([url.as_str(), into.to_str().unwrap()]);
    git(site.dir.path(), &site.dir.path().join("home"), &args);
    (origin, site)
}

#[test]
fn partial_clone_accepts_commits_in_the_guest() {
    for (filter, sparse) in [
        ("--filter=blob:none", true),
        ("--filter=blob:none", false),
        ("--filter=tree:0", true),
    ] {
        let (origin, site) = partial_clone(filter, sparse);
        let canary = site.dir.path().join("canary");
        let script = site.dir.path().join("upload");
        std::fs::write(
            &script,
            format!(
                "#!/bin/sh\ntouch {}\nexec git-upload-pack \"$@\"\n",
                canary.display()
            ),
        )
        .unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        site.git(&[
            "config",
            "remote.origin.uploadpack",
            script.to_str().unwrap(),
        ]);
        site.prepare();
        assert!(!canary.exists(), "git fetched on the host");
        // The guest cannot reach the origin.
        std::fs::rename(origin.host(), origin.dir.path().join("gone")).unwrap();
        assert_eq!(site.git_guest(&["status", "--porcelain"]), "", "{filter}");
        site.write_guest("a", "in the guest\n");
        site.write_guest("new", "in the guest\n");
        site.git_guest(&["add", "a", "new"]);
        site.git_guest(&["commit", "-q", "-m", "in the guest"]);
        assert_eq!(
            site.git_guest(&["log", "--format=%s"]),
            "in the guest\nsecond\nfirst\n"
        );
        assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
        if sparse {
            assert_eq!(
                site.git_guest(&["sparse-checkout", "list"]),
                site.git(&["sparse-checkout", "list"])
            );
            assert_eq!(site.git_guest(&["ls-files", "-t", "dir/b"]), "S dir/b\n");
        }
        site.git_guest(&["fsck"]);
        site.git_guest(&["gc", "-q"]);
        site.git_guest(&["commit", "-q", "--allow-empty", "-m", "after the gc"]);
        let (patch, changed) = export(&site);
        assert_eq!(changed, 2, "{patch}");
        assert_eq!(site.prepare(), [".git/HEAD", "a", "new"]);
    }
}

#[test]
fn promisor_of_a_partial_clone_is_sent_without_its_secrets() {
    let check = |url: &str, want: &str| {
        let (_origin, site) = partial_clone("--filter=blob:none", true);
        site.git(&["config", "remote.origin.url", url]);
        site.prepare();
        let got = |key: &str| {
            site.git_guest(&["config", "--default", "", key])
                .trim()
                .to_owned()
        };
        assert_eq!(got("remote.origin.url"), want, "{url}");
        assert_eq!(got("remote.origin.promisor"), "true");
        assert_eq!(got("remote.origin.partialclonefilter"), "blob:none");
        let text = std::fs::read_to_string(site.guest().join(".git/config")).unwrap();
        assert!(!text.contains("s3cret"), "{text}");
    };
    check("https://example.org/x.git", "https://example.org/x.git");
    check(
        "https://user:s3cret@example.org/x.git",
        "https://example.org/x.git",
    );
    check(
        "https://s3cret@example.org:8443/x",
        "https://example.org:8443/x",
    );
    check("https://example.org/x?token=s3cret", "");
    check("git@example.org:x", "");
    check("ext::s3cret", "");
    check("/srv/s3cret", "");
}
