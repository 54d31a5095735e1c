use super::*;
use crate::error::Kind;
use std::os::unix::fs::symlink;

/// Makes changes of every kind in the guest: a commit, an edit, a deletion, a rename, a new file, a
/// binary file, a mode and a link.
fn work_in_the_guest(site: &Site, has_git: bool) {
    let guest = site.guest();
    site.write_guest("a", "one\nchanged in the guest\n");
    if has_git {
        site.git_guest(&["add", "a"]);
        site.git_guest(&[
            "-c",
            "user.name=g",
            "-c",
            "user.email=g@g",
            "commit",
            "-q",
            "-m",
            "in the guest",
        ]);
    }
    std::fs::remove_file(guest.join("gone")).unwrap();
    std::fs::rename(guest.join("dir/b"), guest.join("moved b")).unwrap();
    site.write_guest("new/with space\nand line", "new\n");
    site.write_guest("empty-new", "");
    std::fs::write(
        guest.join(OsStr::from_bytes(b"bin\xff")),
        (0..=255u8).cycle().take(5000).collect::<Vec<_>>(),
    )
    .unwrap();
    site.write_guest("no newline", "x");
    std::fs::set_permissions(guest.join("run"), std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::set_permissions(guest.join("plain"), std::fs::Permissions::from_mode(0o755)).unwrap();
    symlink("/etc/passwd", guest.join("link-new")).unwrap();
    std::fs::remove_file(guest.join("link")).unwrap();
    symlink("elsewhere", guest.join("link")).unwrap();
    // A file becomes a directory, a directory becomes a file, and both a directory and a file
    // become links.
    std::fs::remove_file(guest.join("file-to-dir")).unwrap();
    site.write_guest("file-to-dir/inside", "x\n");
    std::fs::remove_dir_all(guest.join("dir-to-file")).unwrap();
    site.write_guest("dir-to-file", "x\n");
    std::fs::remove_dir_all(guest.join("dir-to-link")).unwrap();
    symlink("new", guest.join("dir-to-link")).unwrap();
    std::fs::remove_file(guest.join("file-to-link")).unwrap();
    symlink("a", guest.join("file-to-link")).unwrap();
}

fn fill(site: &Site) {
    for (name, text) in [
        ("a", "one\ntwo\n"),
        ("dir/b", "bee\n"),
        ("gone", "gone\n"),
        ("run", "#!/bin/sh\n"),
        ("plain", "plain\n"),
        ("file-to-dir", "x\n"),
        ("dir-to-file/inside", "x\n"),
        ("dir-to-link/inside", "x\n"),
        ("file-to-link", "x\n"),
        ("crlf", "a\r\nb\r\n"),
    ] {
        site.write(name, text);
    }
    site.chmod("run", 0o755);
    symlink("a", site.path("link")).unwrap();
    std::fs::write(site.path(OsStr::from_bytes(b"raw\xfe")), b"\0\xff").unwrap();
}

/// Returns the refs, the number of objects, and every file of the guest's repository including its
/// index.
fn repository_state(site: &Site) -> (String, Listing) {
    let commands: [&[&str]; 3] = [
        &["for-each-ref"],
        &["rev-parse", "HEAD"],
        &["count-objects", "-v"],
    ];
    (
        commands.map(|args| site.git_guest(args)).concat(),
        listing(&site.guest().join(".git")),
    )
}

#[track_caller]
fn check(site: &Site, has_git: bool) -> String {
    site.prepare();
    site.assert_same_tree();
    assert_eq!(
        site.export_patch().unwrap(),
        (Vec::new(), 0),
        "the export contains no changes that the user made before the import"
    );
    work_in_the_guest(site, has_git);
    let before = has_git.then(|| repository_state(site));
    let state_before = listing(Path::new(&site.workspace.state_dir));
    site.export_tree().unwrap();
    let patch = site.apply_export();
    assert!(
        before.is_none_or(|b| b == repository_state(site)),
        "the guest's repository was changed"
    );
    assert!(
        state_before == listing(Path::new(&site.workspace.state_dir)),
        "the baseline was changed"
    );
    assert!(patch.contains("GIT binary patch") && patch.contains("new mode 100755"));
    patch
}

#[test]
fn export_from_a_clean_tree() {
    let site = Site::unborn();
    fill(&site);
    site.commit("all");
    let patch = check(&site, true);
    expect_test::expect![[r#"
        diff --git a/a b/a
        index 814f4a422927b82f5f8a43f8fab6d3839e3983f2..dc0d39d2ae535d9c649da474e255bbc645da29e4 100644
        --- a/a
        +++ b/a
    "#]]
    .assert_eq(&(patch.lines().take(4).collect::<Vec<_>>().join("\n") + "\n"));
}

#[test]
fn export_from_a_dirty_tree() {
    let site = Site::unborn();
    fill(&site);
    site.commit("all");
    site.write("a", "one\ntwo\ndirty\n");
    site.write("crlf", "a\r\nchanged\r\n");
    site.git(&["add", "crlf"]);
    site.write("untracked", "mine\n");
    site.git(&["rm", "-q", "--cached", "plain"]);
    check(&site, true);
}

#[test]
fn export_from_an_unborn_tree() {
    let site = Site::unborn();
    fill(&site);
    site.git(&["add", "a", "dir"]);
    check(&site, true);
}

#[test]
fn export_from_a_tree_without_git() {
    let site = Site::plain();
    fill(&site);
    site.write("x.o", "nothing is ignored here");
    check(&site, false);
}

#[test]
fn export_counts_changes_of_every_kind_per_file() {
    let site = Site::unborn();
    fill(&site);
    site.prepare();
    work_in_the_guest(&site, false);
    let (patch, files) = site.export_patch().unwrap();
    let text = String::from_utf8_lossy(&patch);
    let mut headers: Vec<&str> = text
        .lines()
        .filter(|l| l.starts_with("diff --git "))
        .collect();
    let entries = headers.len();
    headers.dedup();
    assert_eq!(files, headers.len() as u64, "{text}");
    assert_eq!(entries, headers.len() + 1, "the type of one file changed");
}

#[test]
fn export_skips_ignored_files_but_includes_forced_ones() {
    let site = Site::committed();
    site.write(".gitignore", "*.o\n");
    site.write("tracked.o", "x\n");
    site.git(&["add", "-f", "tracked.o"]);
    site.commit("ignore");
    site.prepare();
    site.write_guest("junk.o", "junk");
    site.write_guest("forced.o", "wanted\n");
    site.write_guest("tracked.o", "changed\n");
    site.git_guest(&["add", "-f", "forced.o"]);
    // This file is only in the guest's index and no longer on disk.
    site.write_guest("vanished.o", "x");
    site.git_guest(&["add", "-f", "vanished.o"]);
    std::fs::remove_file(site.guest().join("vanished.o")).unwrap();
    let (patch, changed) = site.export_patch().unwrap();
    let patch = String::from_utf8(patch).unwrap();
    assert_eq!(changed, 2, "{patch}");
    assert!(patch.contains("b/forced.o") && patch.contains("b/tracked.o"));
}

#[test]
fn baseline_survives_changes_to_the_guests_repository() {
    let site = Site::committed();
    site.prepare();
    site.write_guest("a", "changed\n");
    std::fs::remove_dir_all(site.guest().join(".git")).unwrap();
    site.apply_export();
    git(&site.guest(), &site.guest(), &["init", "-q"]);
    assert_eq!(site.export_patch().unwrap().1, 1);
}

#[test]
fn export_ignores_filters_hooks_and_drivers_of_the_guest() {
    let site = Site::committed();
    site.prepare();
    let canary = site.dir.path().join("canary");
    let touch = format!("touch {}; cat", canary.display());
    for key in [
        "filter.x.clean",
        "diff.x.textconv",
        "diff.x.command",
        "diff.external",
        "core.fsmonitor",
        "core.pager",
    ] {
        site.git_guest(&["config", key, &touch]);
    }
    site.git_guest(&["config", "core.autocrlf", "true"]);
    site.write_guest(".gitattributes", "* filter=x diff=x text eol=crlf\n");
    site.write_guest(".git/info/attributes", "* filter=x\n");
    site.write_guest("a", "x\r\ny\n");
    site.apply_export();
    assert_eq!(std::fs::read(site.path("a")).unwrap(), b"x\r\ny\n");
    assert!(!canary.exists());
}

#[test]
fn export_tree_is_identical() {
    for has_git in [true, false] {
        let site = if has_git {
            Site::unborn()
        } else {
            Site::plain()
        };
        fill(&site);
        site.write(".gitignore", "*.o\n");
        site.write(&format!("{}/{}", "d".repeat(200), "n".repeat(250)), "long");
        symlink("t".repeat(300), site.path("long-target")).unwrap();
        site.prepare();
        work_in_the_guest(&site, false);
        std::fs::File::create(site.guest().join("hole"))
            .unwrap()
            .set_len(1 << 24)
            .unwrap();
        std::fs::hard_link(site.guest().join("a"), site.guest().join("hard")).unwrap();
        let out = site.dir.path().join("out");
        let unpacked = unpack_tree(&site.export_tree().unwrap(), &out).unwrap();
        assert!(unpacked.entries > 15);
        assert_eq!(listing(&site.guest()), listing(&out));
        assert!(std::fs::metadata(out.join("hole")).unwrap().blocks() < 2048);
        assert!(!out.join(".git").exists());
        let e = unpack_tree(&site.export_tree().unwrap(), &out).unwrap_err();
        assert_eq!(e.kind(), Kind::TargetExists);
    }
}

#[test]
fn export_without_a_complete_workspace_fails() {
    let site = Site::committed();
    assert_eq!(site.status(), Status::None);
    assert_eq!(
        site.export_patch().unwrap_err().kind(),
        Kind::WorkspaceNotFound
    );
    site.begin().unwrap();
    assert_eq!(site.status(), Status::Incomplete);
    assert_eq!(
        site.export_patch().unwrap_err().kind(),
        Kind::WorkspaceIncomplete
    );
    site.prepare();
    assert_eq!(site.status(), Status::Complete);
    receive_patch(&site.export_patch().unwrap().0, &site.dir.path().join("x")).unwrap();
}
