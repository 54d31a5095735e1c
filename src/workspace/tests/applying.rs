use super::*;
use crate::error::Kind;
use std::os::unix::fs::symlink;

/// Encodes UTF-16LE with a byte order mark.
fn utf16(text: &str) -> Vec<u8> {
    std::iter::once(0xfeff)
        .chain(text.encode_utf16())
        .flat_map(u16::to_le_bytes)
        .collect()
}

/// Encodes UTF-16LE without a byte order mark, as `working-tree-encoding=UTF-16LE` requires.
fn utf16le(text: &str) -> Vec<u8> {
    utf16(text)[2..].to_vec()
}

/// Creates a repository with one file for each kind of conversion that git knows, including a
/// filter of the user.
fn converted() -> Site {
    let site = Site::unborn();
    site.git(&["config", "filter.shout.clean", "tr A-Z a-z"]);
    site.git(&["config", "filter.shout.smudge", "tr a-z A-Z"]);
    site.write(
        ".gitattributes",
        "*.rc text working-tree-encoding=UTF-16LE\n*.bom text working-tree-encoding=UTF-16\n*.id ident\n\
         *.dos text eol=crlf\n*.unix text eol=lf\n*.loud filter=shout\n*.all text ident eol=crlf working-tree-encoding=UTF-16\n",
    );
    site.write(
        "nested/.gitattributes",
        "*.txt eol=crlf text\n*.rc -text !working-tree-encoding\n",
    );
    site.write("a.rc", utf16le("one\ntwo\n"));
    site.write("a.bom", utf16("one\ntwo\n"));
    site.write("a.id", "$Id$\none\n");
    site.write("a.dos", "one\r\ntwo\r\n");
    site.write("a.unix", "one\ntwo\n");
    site.write("a.loud", "ONE\nTWO\n");
    site.write("a.all", utf16("$Id$\r\none\r\n"));
    site.write("nested/a.txt", "one\r\n");
    site.write("nested/a.rc", "plain\r\n");
    site.write("plain", "one\ntwo\n");
    site.commit("all kinds");
    // A checkout expands `$Id$` to the name of the blob.
    for name in ["a.id", "a.all"] {
        std::fs::remove_file(site.path(name)).unwrap();
        site.git(&["checkout", "-q", "--", name]);
    }
    assert_eq!(site.git(&["status", "--porcelain"]), "");
    site
}

/// Changes a file of every kind in the middle and at the end, and adds a new file of each kind.
fn edit_every_kind(site: &Site) {
    for name in [
        "a.rc",
        "a.bom",
        "a.id",
        "a.dos",
        "a.unix",
        "a.loud",
        "a.all",
        "nested/a.txt",
        "nested/a.rc",
        "plain",
    ] {
        let mut bytes = std::fs::read(site.guest().join(name)).unwrap();
        let more: Vec<u8> = match name {
            "a.rc" | "a.bom" => utf16le("three\n"),
            "a.all" => utf16le("three\r\n"),
            "a.dos" | "nested/a.txt" => b"three\r\n".to_vec(),
            _ => b"three\n".to_vec(),
        };
        bytes.extend(more);
        site.write_guest(name, &bytes);
        let (dir, file) = name.rsplit_once('/').map_or(("", name), |(d, f)| (d, f));
        let dir = if dir.is_empty() {
            String::new()
        } else {
            format!("{dir}/")
        };
        site.write_guest(&format!("{dir}new {file}"), &bytes);
    }
    site.write_guest("new.dos", "only\nLF\n");
    site.write_guest("new.unix", "CR\r\nLF\r\n");
    site.write_guest("mixed.dos", "one\r\ntwo\nthree\r\n");
    site.write_guest("odd.rc", b"not UTF-16");
    site.write_guest("empty.rc", "");
    site.write_guest("lower.loud", "lower\n");
    site.write_guest("$Id$.id", "$Id: something of mine $\n");
}

#[test]
fn apply_converted_files_is_byte_exact() {
    let site = converted();
    site.prepare();
    edit_every_kind(&site);
    site.apply_export();
    assert_eq!(site.prepare(), Vec::<String>::new());
    assert_eq!(site.export_patch().unwrap(), (Vec::new(), 0));
}

#[test]
fn apply_ignores_attributes_changed_in_the_guest() {
    let site = converted();
    site.prepare();
    edit_every_kind(&site);
    site.write_guest(
        ".gitattributes",
        "* text eol=crlf ident filter=shout working-tree-encoding=UTF-16\n",
    );
    site.write_guest("deeper/.gitattributes", "* text eol=crlf\n");
    site.write_guest("deeper/x", "one\ntwo\n");
    std::fs::remove_file(site.guest().join("nested/.gitattributes")).unwrap();
    site.apply_export();
}

#[test]
fn apply_ignores_the_users_conversion_settings() {
    for (key, value) in [
        ("core.autocrlf", "true"),
        ("core.autocrlf", "input"),
        ("apply.whitespace", "fix"),
        ("core.eol", "crlf"),
    ] {
        let site = Site::committed();
        site.write("dos", "one\r\ntwo\r\n");
        site.commit("dos");
        write(
            &site.dir.path().join("home"),
            "attributes",
            "* text=auto ident\n",
        );
        let attributes = site.dir.path().join("home/attributes");
        for scope in ["--global", "--local"] {
            site.git(&["config", scope, key, value]);
            site.git(&[
                "config",
                scope,
                "core.attributesFile",
                attributes.to_str().unwrap(),
            ]);
        }
        site.prepare();
        site.write_guest("dos", "one\r\ntwo\r\nthree \t\r\n");
        site.write_guest("a", "one\ntwo\ntrailing \t\n\n\n");
        site.write_guest("new", "x\ny $Id$ \n");
        site.write_guest("new dos", "x\r\ny\r\n");
        site.apply_export();
    }
}

/// Runs the printed command as a user would who pastes it into a shell.
#[test]
fn apply_by_hand_gives_the_same_result() {
    let site = converted();
    write(
        &site.dir.path().join("home"),
        ".config/git/attributes",
        "* text eol=crlf\n",
    );
    for (key, value) in [
        ("core.autocrlf", "true"),
        ("apply.whitespace", "fix"),
        ("apply.ignoreWhitespace", "change"),
    ] {
        site.git(&["config", "--global", key, value]);
    }
    site.prepare();
    edit_every_kind(&site);
    let (patch, top) = (site.patch_file(), site.host());
    let line = apply::by_hand(&top, &top, &patch, &site.caller(), &cancel()).unwrap();
    let want = "git --git-dir= -c core.autocrlf=false -c core.attributesFile=/dev/null apply --whitespace=nowarn \
                --no-ignore-whitespace ";
    assert_eq!(
        line.strip_prefix("GIT_ATTR_NOSYSTEM=1 ").unwrap_or(&line),
        format!("{want}{}", patch.display())
    );
    // The command works from a subdirectory and from an unrelated directory.
    let line = apply::by_hand(
        &top,
        &site.path("nested"),
        &patch,
        &site.caller(),
        &cancel(),
    )
    .unwrap();
    assert!(
        line.contains(&format!("git -C {} --git-dir= ", top.display())),
        "{line}"
    );
    let home = site.dir.path().join("home");
    run(Command::new("sh")
        .args(["-c", &line])
        .cwd(site.path("nested"))
        .env("HOME", &home));
    site.assert_same_tree();
}

#[test]
fn apply_by_hand_needs_no_option_without_configuration() {
    let site = Site::committed();
    site.prepare();
    site.write_guest("a", "changed\n");
    let patch = site.patch_file();
    std::fs::rename(&patch, site.path("it's here")).unwrap();
    let line = apply::by_hand(
        &site.host(),
        &site.host(),
        &site.path("it's here"),
        &site.caller(),
        &cancel(),
    )
    .unwrap();
    let line = line
        .strip_prefix("GIT_ATTR_NOSYSTEM=1 ")
        .unwrap_or(&line)
        .to_owned();
    assert_eq!(
        line,
        format!(
            "git --git-dir= apply '{}/it'\\''s here'",
            site.host().display()
        )
    );
}

#[test]
fn apply_binary_patch_in_a_sha256_repository() {
    let site = Site::plain();
    site.git(&["init", "-q", "--object-format=sha256"]);
    site.git(&["config", "user.email", "x@y"]);
    site.git(&["config", "user.name", "x"]);
    site.write("bin", (0..=255u8).cycle().take(3000).collect::<Vec<_>>());
    site.commit("one");
    site.prepare();
    site.write_guest(
        "bin",
        (0..=255u8).rev().cycle().take(3000).collect::<Vec<_>>(),
    );
    site.write_guest("new bin", [0, 1, 2, 255]);
    let patch = site.patch_file();
    assert_eq!(
        apply::by_hand(
            &site.host(),
            &site.host(),
            &patch,
            &site.caller(),
            &cancel()
        ),
        None
    );
    site.apply_export();
}

#[test]
fn apply_lists_changes_and_an_empty_patch_has_none() {
    let site = Site::committed();
    site.prepare();
    assert_eq!(site.apply(&site.patch_file()).unwrap(), []);
    site.write_guest("a", "one\nthree\nfour\n");
    site.write_guest("new\nline", "x\n");
    site.write_guest("bin", [0, 1]);
    std::fs::remove_file(site.guest().join("dir/b")).unwrap();
    let file = site.patch_file();
    let checked = apply::check(&site.host(), &file, &site.caller(), &cancel()).unwrap();
    let seen: Vec<_> = checked
        .changes
        .iter()
        .map(|c| (c.path.as_slice(), c.added, c.removed))
        .collect();
    let want = [
        (&b"a"[..], Some(2), Some(1)),
        (b"bin", None, None),
        (b"dir/b", Some(0), Some(1)),
        (b"new\nline", Some(1), Some(0)),
    ];
    assert_eq!(seen, want);
    assert!(!site.path("bin").exists(), "a check changes nothing");
    checked.apply_all().unwrap();
    site.assert_same_tree();
}

/// Checks that the patch is refused with an error that contains `word`, and that the host's tree is
/// unchanged.
#[track_caller]
fn check_refused(site: &Site, patch: &Path, word: &str) {
    let before = listing(&site.host());
    let e = site.apply(patch).unwrap_err();
    assert_eq!(e.kind(), Kind::Conflict, "{e}");
    assert!(e.to_string().contains(word), "{e}");
    assert!(e.hint_text().is_some());
    assert!(before == listing(&site.host()), "something was changed");
}

#[test]
fn apply_over_a_local_change_is_refused_and_changes_nothing() {
    let prepared = || {
        let site = Site::committed();
        site.write("bin", (0..=255u8).cycle().take(3000).collect::<Vec<_>>());
        site.commit("bin");
        site.prepare();
        site.write_guest("aaa-first", "new\n");
        site.write_guest("zzz-last", "new\n");
        site
    };
    let site = prepared();
    site.write_guest("a", "one\nguest\n");
    site.write("a", "one\nhost\n");
    check_refused(&site, &site.patch_file(), "a: patch does not apply");

    let site = prepared();
    site.write_guest("new", "guest\n");
    site.write("new", "host\n");
    check_refused(&site, &site.patch_file(), "new: already exists");

    let site = prepared();
    site.write_guest("new", "guest\n");
    site.write("new/deeper/inside", "host\n");
    check_refused(&site, &site.patch_file(), "new is a directory here");

    let site = prepared();
    site.write_guest("new/deeper/inside", "guest\n");
    site.write("new", "host\n");
    check_refused(&site, &site.patch_file(), "new is a file here");

    // A directory became a file in the guest, and the host has since added an ignored file to that
    // directory.
    let site = prepared();
    std::fs::remove_dir_all(site.guest().join("dir")).unwrap();
    site.write_guest("dir", "a file\n");
    site.write(".git/info/exclude", "*.o\n");
    site.write("dir/x.o", "ignored\n");
    check_refused(&site, &site.patch_file(), "dir is a directory here");
    std::fs::remove_file(site.path("dir/x.o")).unwrap();
    std::fs::create_dir_all(site.path("dir/nothing/in it")).unwrap();
    check_refused(&site, &site.patch_file(), "dir");
    std::fs::remove_dir_all(site.path("dir/nothing")).unwrap();
    site.apply(&site.patch_file()).unwrap();

    let site = prepared();
    std::fs::remove_file(site.guest().join("dir/b")).unwrap();
    site.write("dir/b", "changed here\n");
    check_refused(&site, &site.patch_file(), "dir/b");

    let site = prepared();
    site.write_guest("bin", b"\0guest");
    site.write("bin", b"\0host");
    check_refused(&site, &site.patch_file(), "bin");

    let site = prepared();
    site.write_guest("a", "one\nguest\n");
    std::fs::remove_file(site.path("a")).unwrap();
    check_refused(&site, &site.patch_file(), "a: No such file");
    // Here both sides made the same change. The rest of the patch must still apply.
    let site = prepared();
    site.write("other", "mine\n");
    site.apply(&site.patch_file()).unwrap();
    assert!(site.path("other").exists() && site.path("zzz-last").exists());
}

#[test]
fn apply_path_outside_the_tree_is_refused() {
    let site = Site::committed();
    let outside = site.dir.path().join("host");
    symlink(&outside, site.path("link")).unwrap();
    symlink(".git", site.path("to-git")).unwrap();
    for path in [
        "../evil",
        "/tmp/fcd-evil",
        "dir/../../evil",
        ".git/hooks/post-checkout",
        "x/.git/config",
        "x/.GIT/config",
        "link/evil",
        "to-git/hooks/post-checkout",
        "./a/../../evil",
    ] {
        for (old, new) in [
            ("/dev/null".to_owned(), format!("b/{path}")),
            ("/dev/null".to_owned(), path.to_owned()),
        ] {
            let text = format!(
                "diff --git a/good b/good\nnew file mode 100644\n--- /dev/null\n+++ b/good\n@@ -0,0 +1 @@\n+x\n\
                 diff --git a/{path} b/{path}\nnew file mode 100755\n--- {old}\n+++ {new}\n@@ -0,0 +1 @@\n+x\n"
            );
            let file = site.dir.path().join("hostile.patch");
            std::fs::write(&file, text).unwrap();
            let before = listing(site.dir.path());
            let e = site.apply(&file).unwrap_err();
            assert_eq!(e.kind(), Kind::Conflict, "{path}: {e}");
            assert!(
                before == listing(site.dir.path()),
                "{path}: something was written"
            );
        }
    }
    assert!(!Path::new("/tmp/fcd-evil").exists());
    // The patch creates a link and then a file behind it.
    let text = "diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+..\n\\ No newline at end of file\n\
                diff --git a/l/evil b/l/evil\nnew file mode 100644\n--- /dev/null\n+++ b/l/evil\n@@ -0,0 +1 @@\n+x\n";
    let file = site.dir.path().join("hostile.patch");
    std::fs::write(&file, text).unwrap();
    check_refused(&site, &file, "l/evil");
    std::fs::write(&file, "this is not a patch\n").unwrap();
    check_refused(&site, &file, "patch");
}

#[test]
fn apply_runs_nothing_of_the_hosts_repository() {
    let site = converted();
    let canary = site.dir.path().join("canary");
    for key in [
        "filter.shout.clean",
        "filter.shout.smudge",
        "core.fsmonitor",
    ] {
        site.git(&["config", key, &format!("touch {}; cat", canary.display())]);
    }
    site.git(&["config", "filter.shout.required", "true"]);
    let plan = site.plan().unwrap();
    drop(plan);
    site.prepare();
    edit_every_kind(&site);
    site.apply_export();
    assert!(!canary.exists());
}

#[test]
fn apply_odd_names_modes_links_and_types() {
    let site = Site::committed();
    site.write("to-link", "x\n");
    site.write("to-dir", "x\n");
    site.commit("more");
    site.prepare();
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
        "trailing ",
    ] {
        site.write_guest(name, name);
        site.write_guest(&format!("in {name}/{name}"), name);
    }
    write(&site.guest(), "plain", "x");
    std::fs::write(
        site.guest().join(OsStr::from_bytes(b"raw\xff\xfe")),
        b"\0\xff",
    )
    .unwrap();
    std::fs::set_permissions(
        site.guest().join("run"),
        std::fs::Permissions::from_mode(0o644),
    )
    .unwrap();
    std::fs::set_permissions(
        site.guest().join("a"),
        std::fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    symlink("nowhere\nat all", site.guest().join("dangling")).unwrap();
    std::fs::remove_file(site.guest().join("to-link")).unwrap();
    symlink("/etc/passwd", site.guest().join("to-link")).unwrap();
    std::fs::remove_file(site.guest().join("to-dir")).unwrap();
    site.write_guest("to-dir/inside", "x");
    site.apply_export();
}

#[test]
fn apply_from_a_subdirectory_uses_the_top_of_the_repository() {
    let site = Site::committed();
    assert_eq!(
        apply::top_of(&site.path("dir")).unwrap(),
        std::fs::canonicalize(site.host()).unwrap()
    );
    let plain = Site::plain();
    plain.write("dir/x", "x");
    assert_eq!(
        apply::top_of(&plain.path("dir")).unwrap(),
        std::fs::canonicalize(plain.path("dir")).unwrap()
    );
    for missing in [plain.path("nothing"), plain.path("dir/x")] {
        assert_eq!(
            apply::top_of(&missing).unwrap_err().kind(),
            Kind::PathNotFound
        );
    }
    // A tree without git accepts a patch too.
    plain.prepare();
    plain.write_guest("dir/x", "y");
    plain.write_guest("dir/z", "z");
    plain.apply_export();
}
