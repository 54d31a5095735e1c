use super::*;
use crate::error::Kind;
use crate::workspace::raw_tar;
use std::os::unix::fs::symlink;

#[test]
fn second_import_updates_the_guest() {
    let site = Site::committed();
    site.write(".gitignore", "*.o\n");
    site.write("file-to-dir", "x");
    site.write("dir-to-file/x", "x");
    site.write("old/deep/er", "x");
    site.commit("more");
    site.prepare();
    site.write_guest("dir-to-file/junk.o", "ignored in the guest");
    site.write("a", "changed on the host\n");
    std::fs::remove_dir_all(site.path("old")).unwrap();
    std::fs::remove_file(site.path("file-to-dir")).unwrap();
    site.write("file-to-dir/x", "x");
    std::fs::remove_dir_all(site.path("dir-to-file")).unwrap();
    site.write("dir-to-file", "x");
    site.commit("changes");
    site.write("a", "and dirty\n");
    site.write("untracked", "x");
    assert_eq!(site.prepare(), Vec::<String>::new());
    site.assert_same_tree();
    site.assert_same_status();
    assert!(!site.guest().join("old").exists());
    assert_eq!(
        site.git(&["log", "--format=%H"]),
        site.git_guest(&["log", "--format=%H"])
    );
    assert_eq!(site.export_patch().unwrap(), (Vec::new(), 0));
}

#[test]
fn guest_changes_are_named_and_kept() {
    let site = Site::committed();
    for name in [
        "both",
        "deleted-there",
        "deleted-here",
        "same",
        "untouched",
        "left",
    ] {
        site.write(name, "original\n");
    }
    site.commit("more");
    site.prepare();
    for name in ["both", "deleted-here", "left"] {
        site.write_guest(name, "guest\n");
    }
    site.write_guest("same", "equal\n");
    site.write_guest("only-there", "guest\n");
    site.write_guest("collides", "guest\n");
    std::fs::remove_file(site.guest().join("deleted-there")).unwrap();
    site.write("both", "host\n");
    site.write("same", "equal\n");
    site.write("collides", "host\n");
    site.write("untouched", "host\n");
    std::fs::remove_file(site.path("deleted-here")).unwrap();
    let kept = site.prepare();
    assert_eq!(
        kept,
        [
            "both",
            "collides",
            "deleted-here",
            "deleted-there",
            "left",
            "only-there"
        ]
    );
    let there = |name: &str| std::fs::read_to_string(site.guest().join(name)).ok();
    assert_eq!(there("both").unwrap(), "guest\n");
    assert_eq!(there("untouched").unwrap(), "host\n");
    assert_eq!(there("only-there").unwrap(), "guest\n");
    assert_eq!(there("deleted-there"), None);
    // The patch does not contain the host's new content. It contains the guest's kept changes,
    // relative to the content that the host had sent.
    let (patch, changed) = site.export_patch().unwrap();
    let patch = String::from_utf8(patch).unwrap();
    assert_eq!(changed, 6, "{patch}");
    assert!(
        !patch.contains("b/same") && !patch.contains("b/untouched") && patch.contains("+++ b/left")
    );

    site.overwrite();
    site.assert_same_tree();
    site.assert_same_status();
    assert_eq!(site.export_patch().unwrap(), (Vec::new(), 0));
}

#[test]
fn applied_export_is_not_a_change_any_more() {
    let site = Site::committed();
    site.prepare();
    site.write_guest("a", "one\nguest\n");
    site.write_guest("new", "x\n");
    std::fs::remove_file(site.guest().join("dir/b")).unwrap();
    site.apply_export();
    assert_eq!(site.prepare(), Vec::<String>::new());
    assert_eq!(site.export_patch().unwrap(), (Vec::new(), 0));
    site.write_guest("a", "one\nguest\nagain\n");
    assert!(site.apply_export().contains("+again"));
}

#[test]
fn conflicting_file_types_are_kept() {
    let site = Site::committed();
    site.write("f", "x");
    site.write("d/x", "x");
    site.prepare();
    // In the guest the file became a directory, and the directory a link.
    std::fs::remove_file(site.guest().join("f")).unwrap();
    site.write_guest("f/inside", "guest");
    std::fs::remove_dir_all(site.guest().join("d")).unwrap();
    let outside = site.dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    symlink(&outside, site.guest().join("d")).unwrap();
    site.write_guest("n/inside", "guest");
    site.write("n", "a file here");
    site.write("d/y", "new here");
    let kept = site.prepare();
    assert_eq!(kept, ["d", "d/x", "d/y", "f", "f/inside", "n", "n/inside"]);
    assert_eq!(
        std::fs::read_dir(&outside).unwrap().count(),
        0,
        "nothing is written through a link"
    );
    site.overwrite();
    site.assert_same_tree();
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn guest_commits_are_kept_unless_overwritten() {
    let site = Site::committed();
    site.prepare();
    site.write_guest("a", "guest\n");
    site.git_guest(&["commit", "-q", "-a", "-m", "guest"]);
    let theirs = site.git_guest(&["rev-parse", "HEAD"]);
    site.write("dir/b", "host\n");
    site.commit("host");
    assert_eq!(site.prepare(), [".git/HEAD", "a"]);
    assert_eq!(site.git_guest(&["rev-parse", "HEAD"]), theirs);
    assert_eq!(
        std::fs::read(site.guest().join("dir/b")).unwrap(),
        b"host\n"
    );
    site.overwrite();
    assert_eq!(
        site.git(&["rev-parse", "HEAD"]),
        site.git_guest(&["rev-parse", "HEAD"])
    );
    site.assert_same_status();
    // The overwritten commits are still reachable.
    assert_eq!(
        site.git_guest(&["for-each-ref", "--format=%(objectname)", "refs/fcd"]),
        theirs
    );
    site.write("dir/b", "host again\n");
    site.commit("host again");
    assert_eq!(site.prepare(), Vec::<String>::new());
    assert_eq!(
        site.git(&["rev-parse", "HEAD"]),
        site.git_guest(&["rev-parse", "HEAD"])
    );
}

#[test]
fn host_may_switch_branches_reset_and_rewrite() {
    let site = Site::committed();
    site.write("a", "second\n");
    site.commit("second");
    site.prepare();
    site.git(&["checkout", "-q", "-b", "other", "HEAD~1"]);
    site.prepare();
    site.assert_same_status();
    assert_eq!(site.git_guest(&["branch", "--show-current"]), "other\n");
    site.git(&["commit", "-q", "--amend", "-m", "rewritten"]);
    site.git(&["checkout", "-q", "--detach"]);
    site.prepare();
    site.assert_same_status();
    assert_eq!(
        site.git(&["log", "--format=%H"]),
        site.git_guest(&["log", "--format=%H"])
    );
    site.git_guest(&["fsck", "--no-dangling"]);
}

#[test]
fn interrupted_import_is_incomplete_and_can_be_repeated() {
    let site = Site::committed();
    for i in 0..20 {
        site.write(&format!("files/{i}"), format!("{i}\n").repeat(300));
    }
    site.prepare();
    for i in 0..20 {
        site.write(&format!("files/{i}"), format!("{i} again\n").repeat(300));
    }
    site.write_guest("dir/b", "guest\n");
    let mut payload = Vec::new();
    let keep = site.begin().unwrap();
    assert_eq!(keep, [b"dir/b".to_vec()]);
    site.plan()
        .unwrap()
        .send(&mut payload, &keep, &mut |_, _| {}, &cancel())
        .unwrap();
    let cuts = [
        0,
        5,
        20,
        payload.len() / 4,
        payload.len() / 2,
        payload.len() - 3072,
        payload.len() - 1024,
    ];
    for cut in cuts {
        assert_eq!(
            site.begin().unwrap(),
            [b"dir/b".to_vec()],
            "files of an interrupted import are not changes of the guest"
        );
        // tar does not notice an interruption at the end of a block. Only the missing trailer shows
        // it, and then finish is not called.
        let _ = site.receive(payload[..cut].to_vec(), false);
        assert_eq!(site.status(), Status::Incomplete, "{cut}");
        assert_eq!(
            site.export_patch().unwrap_err().kind(),
            Kind::WorkspaceIncomplete
        );
    }
    assert!(site.finish(&Finish::default()).is_ok() || site.status() == Status::Incomplete);
    site.begin().unwrap();
    assert_eq!(
        site.finish(&Finish::default()).unwrap_err().kind(),
        Kind::WorkspaceIncomplete
    );
    assert_eq!(site.prepare(), ["dir/b"]);
    assert_eq!(
        std::fs::read(site.guest().join("files/19")).unwrap(),
        std::fs::read(site.path("files/19")).unwrap()
    );
    assert_eq!(site.status(), Status::Complete);
    let (_, changed) = site.export_patch().unwrap();
    assert_eq!(changed, 1);
}

/// Killing a guest is like a power cut: recently written files may exist but be empty.
#[test]
fn first_import_interrupted_by_a_power_cut_is_repeated() {
    let site = Site::committed();
    let state = PathBuf::from(&site.workspace.state_dir);
    let mut payload = Vec::new();
    site.begin().unwrap();
    site.plan()
        .unwrap()
        .send(&mut payload, &[], &mut |_, _| {}, &cancel())
        .unwrap();
    payload.truncate(payload.len() - 3072);
    let _ = site.receive(payload, false);
    for torn in ["git/HEAD", "git/config"] {
        assert!(state.join(torn).exists(), "{torn}");
        std::fs::write(state.join(torn), "").unwrap();
    }
    assert_eq!(site.prepare(), Vec::<String>::new());
    site.assert_same_tree();
    site.assert_same_status();
    assert_eq!(site.export_patch().unwrap(), (Vec::new(), 0));
}

#[test]
fn repository_half_created_at_a_power_cut_is_created_again() {
    let site = Site::committed();
    let state = PathBuf::from(&site.workspace.state_dir);
    site.begin().unwrap();
    let git = site.guest().join(".git");
    std::fs::create_dir_all(&git).unwrap();
    std::fs::write(git.join("HEAD"), "").unwrap();
    std::fs::write(state.join("init"), "").unwrap();
    assert_eq!(site.prepare(), Vec::<String>::new());
    site.assert_same_tree();
    site.assert_same_status();
    // A repository that the guest itself broke is left alone.
    std::fs::write(git.join("HEAD"), "").unwrap();
    assert_eq!(site.prepare(), [".git/HEAD"]);
}

#[test]
fn locks_of_a_killed_git_are_removed() {
    let site = Site::committed();
    site.prepare();
    let state = PathBuf::from(&site.workspace.state_dir);
    // These are the locks that a killed git leaves: on the compared index, on the new index, and in
    // the guest's repository.
    for lock in [
        "current.index.lock",
        "index.new.lock",
        "repo.index.lock",
        "recall.index.lock",
        "repository",
    ] {
        std::fs::write(state.join(lock), "").unwrap();
    }
    let git = site.guest().join(".git");
    for lock in ["index.lock", "HEAD.lock", "refs/heads/trunk.lock"] {
        std::fs::write(git.join(lock), "").unwrap();
    }
    site.write("a", "changed\n");
    site.commit("more");
    assert_eq!(site.prepare(), Vec::<String>::new());
    site.assert_same_tree();
    site.assert_same_status();
    // A lock that belongs to the guest must not be removed.
    std::fs::write(git.join("HEAD.lock"), "").unwrap();
    site.begin().unwrap();
    assert!(git.join("HEAD.lock").exists());
}

#[test]
fn import_waits_for_an_earlier_connection_to_end() {
    let site = Site::committed();
    site.prepare();
    let held =
        std::fs::File::create(PathBuf::from(&site.workspace.state_dir).join("alone")).unwrap();
    held.lock().unwrap();
    std::thread::scope(|s| {
        let begun = s.spawn(|| site.begin());
        // In proc_locks(5), an arrow marks a waiting process; device and inode follow.
        let inode = format!(
            ":{} ",
            std::os::unix::fs::MetadataExt::ino(&held.metadata().unwrap())
        );
        let waits = || {
            let list = std::fs::read_to_string("/proc/locks").unwrap();
            list.lines()
                .any(|l| l.contains("-> FLOCK") && l.contains(&inode))
        };
        let deadline = crate::sched::Instant::now() + Duration::from_secs(30);
        while !waits() {
            assert!(
                crate::sched::Instant::now() < deadline && !begun.is_finished(),
                "the import does not wait for the lock"
            );
            std::thread::yield_now();
        }
        held.unlock().unwrap();
        begun.join().unwrap().unwrap();
    });
}

#[test]
fn interrupted_first_import_leaves_no_guest_changes() {
    let site = Site::committed();
    site.write("old", "x");
    let mut payload = Vec::new();
    site.begin().unwrap();
    site.plan()
        .unwrap()
        .send(&mut payload, &[], &mut |_, _| {}, &cancel())
        .unwrap();
    let _ = site.receive(payload[..payload.len() - 1536].to_vec(), false);
    std::fs::remove_file(site.path("old")).unwrap();
    site.write("a", "other\n");
    assert_eq!(site.prepare(), Vec::<String>::new());
    site.assert_same_tree();
    site.assert_same_status();
}

#[test]
fn files_already_at_the_guest_path_are_kept() {
    let site = Site::committed();
    site.write_guest("a", "somebody else's\n");
    site.write_guest("theirs", "x");
    assert_eq!(site.prepare(), ["a", "theirs"]);
    assert_eq!(
        std::fs::read(site.guest().join("a")).unwrap(),
        b"somebody else's\n"
    );
    assert!(site.guest().join("theirs").exists());

    let link = Site::committed();
    symlink("/tmp", link.guest()).unwrap();
    assert_eq!(link.begin().unwrap_err().kind(), Kind::InvalidGuestPath);
    std::fs::remove_file(link.guest()).unwrap();
    std::fs::write(link.guest(), "a file").unwrap();
    assert_eq!(link.begin().unwrap_err().kind(), Kind::InvalidGuestPath);
}

#[test]
fn plain_tree_can_be_sent_again_and_become_a_repository() {
    let site = Site::plain();
    site.write("a", "1");
    site.write("sub/b", "1");
    std::fs::create_dir(site.path("was empty")).unwrap();
    site.prepare();
    site.write("a", "2");
    std::fs::remove_dir_all(site.path("sub")).unwrap();
    std::fs::remove_dir(site.path("was empty")).unwrap();
    assert_eq!(site.prepare(), Vec::<String>::new());
    site.assert_same_tree();
    assert!(!site.guest().join("sub").exists() && !site.guest().join("was empty").exists());
    site.git(&["init", "-q", "-b", "m"]);
    site.git(&["config", "user.name", "x"]);
    site.git(&["config", "user.email", "x"]);
    site.commit("now it is one");
    site.prepare();
    site.assert_same_status();
    assert_eq!(site.git_guest(&["log", "--format=%s"]), "now it is one\n");
}

#[test]
fn raw_tar_makes_a_workspace() {
    let site = Site::plain();
    site.write("in/x", "1\n");
    site.write("y", "1\n");
    let tar = |site: &Site| {
        let file = site.dir.path().join("raw.tar");
        run(Command::new("tar")
            .arg("-cf")
            .arg(&file)
            .arg(".")
            .cwd(site.host()));
        std::fs::read(file).unwrap()
    };
    let import = |site: &Site, overwrite: bool| -> Result<Finished> {
        let mut keep = site.begin()?;
        if overwrite {
            keep.clear();
        }
        let mut payload = Vec::new();
        raw_tar::send(
            &mut &tar(site)[..],
            &mut payload,
            &keep,
            &mut |_, _| {},
            &cancel(),
        )?;
        site.receive(payload, overwrite)?;
        site.finish(&Finish {
            overwrite,
            ..Finish::default()
        })
    };
    // The files of an interrupted import do not count as changes.
    let mut payload = Vec::new();
    site.begin().unwrap();
    raw_tar::send(
        &mut &tar(&site)[..],
        &mut payload,
        &[],
        &mut |_, _| {},
        &cancel(),
    )
    .unwrap();
    let _ = site.receive(payload[..payload.len() - 9 * 1024].to_vec(), false);
    assert!(site.guest().join("in/x").exists() || site.guest().join("y").exists());
    assert_eq!(import(&site, false).unwrap().entries, 2);
    site.assert_same_tree();
    site.write_guest("y", "guest\n");
    assert_eq!(site.export_patch().unwrap().1, 1);
    assert_eq!(import(&site, false).unwrap_err().kind(), Kind::Conflict);
    import(&site, true).unwrap();
    site.assert_same_tree();
    assert_eq!(site.export_patch().unwrap().1, 0);
    // Imported files also do not count after an import whose content stayed in its archive.
    site.write("big", vec![7; 9_000_000]);
    site.prepare();
    assert!(
        Path::new(&site.workspace.state_dir)
            .join("tree.tar")
            .exists()
    );
    import(&site, true).unwrap();
    assert!(
        !Path::new(&site.workspace.state_dir)
            .join("tree.tar")
            .exists()
    );
    site.write_guest("big", "small");
    site.write_guest("y", "guest\n");
    site.apply_export();
}

#[test]
fn large_content_is_recalled_from_the_archive() {
    for has_git in [false, true] {
        let site = if has_git {
            Site::committed()
        } else {
            Site::plain()
        };
        // finish.sh keeps an archive of more than 8 MiB. Repeated bytes compress quickly.
        let big = (0..=255u8).collect::<Vec<_>>().repeat(33_000);
        site.write("big", &big);
        for name in ["small", "kept", "gone", "-x\ny"] {
            site.write(name, "original\n");
        }
        symlink("small", site.path("link")).unwrap();
        site.prepare();
        assert!(
            Path::new(&site.workspace.state_dir)
                .join("tree.tar")
                .exists()
        );
        assert_eq!(site.export_patch().unwrap(), (Vec::new(), 0));
        let change = |site: &Site| {
            let mut changed = big.clone();
            changed[5_000_000] ^= 1;
            site.write_guest("big", &changed);
            site.write_guest("-x\ny", "guest\n");
            std::fs::remove_file(site.guest().join("gone")).unwrap();
            std::fs::remove_file(site.guest().join("link")).unwrap();
            site.write_guest("link", "a file now\n");
        };
        change(&site);
        let before = listing(Path::new(&site.workspace.state_dir));
        let (patch, changed) = site.export_patch().unwrap();
        assert_eq!(changed, 4);
        assert!(patch.len() < 100_000);
        assert!(before == listing(Path::new(&site.workspace.state_dir)));
        // Kept files keep their baseline when the archive is replaced.
        site.write("small", "host\n");
        assert_eq!(site.prepare().len(), 4);
        assert_eq!(site.export_patch().unwrap().0, patch);
        site.apply_export();
        // Both sides now have the same content, so the new archive becomes the baseline.
        assert_eq!(site.prepare(), Vec::<String>::new());
        assert_eq!(site.export_patch().unwrap().1, 0);
    }
}
