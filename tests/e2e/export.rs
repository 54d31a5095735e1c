//! Tests that an export contains exactly the changes made in the guest, and that it does not change
//! the guest.

use crate::host::{Host, text};
use crate::tree::Site;
use std::fs;

/// A script that changes the guest's tree: a commit, edits, a deletion, a rename, new files, a
/// binary, mode changes, links, and files that change their type.
const WORK: &str = r"umask 022
printf 'one\nchanged in the guest\n' > a
printf 'committed\n' > committed-new
if [ -e .git ]; then git add a committed-new; git commit -qm 'in the guest'; fi
printf 'changed after the commit\n' >> a
printf 'in the guest\n' >> later
rm gone
mv dir/b 'moved b'
rmdir dir
mkdir 'new
dir'
printf 'new\n' > 'new
dir/with space'
: > empty-new
printf 'x' > 'no newline'
head -c 5000 /dev/urandom > bin
head -c 5000 /dev/urandom > bin-old
printf 'x' > $(printf 'raw\377')
chmod 644 run
chmod 755 plain
ln -s /etc/passwd link-new
ln -sfn elsewhere link
rm file-to-dir; mkdir file-to-dir; echo x > file-to-dir/inside
rm -r dir-to-file; echo x > dir-to-file
ln -sf a file-to-link
if [ -e .git ]; then git add 'moved b'; git rm -q --cached plain; fi";

fn fill(site: &Site) {
    for name in [
        "dir/b",
        "gone",
        "plain",
        "file-to-dir",
        "dir-to-file/inside",
        "file-to-link",
        "later",
    ] {
        site.write(name, format!("{name}\n"));
    }
    site.write("a", "one\ntwo\n");
    site.write("crlf", "a\r\nb\r\n");
    site.write("bin-old", (0..=255).cycle().take(3000).collect::<Vec<u8>>());
    site.write(b"old\xfe", b"\0\xff");
    site.write("run", "#!/bin/sh\n");
    site.chmod("run", 0o755);
    site.link("a", "link");
}

/// Returns what follows the first `a/` in each `diff --git` line of a patch: both names of a file,
/// as git writes them.
fn touched(patch: &str) -> Vec<&str> {
    patch
        .lines()
        .filter_map(|l| {
            l.strip_prefix("diff --git a/")
                .or_else(|| l.strip_prefix("diff --git \"a/"))
        })
        .collect()
}

/// Copies a tree to the guest, works there and checks the exported patch. The patch must not
/// contain the files in `users`, which the user changed before the copy.
#[track_caller]
fn there_and_back(site: &Site, has_git: bool, users: &[&str]) {
    site.prepare();
    site.assert_same_tree();
    let (patch, said) = site.export(&[]);
    assert_eq!(
        String::from_utf8_lossy(&patch),
        "",
        "the export contains no changes that the user made before the copy"
    );
    assert!(said.contains("0 files changed"), "{said}");
    site.in_guest(WORK);
    let before = has_git.then(|| site.repository());
    let file = site.beside("guest.patch");
    let (file, tree) = (file.to_str().unwrap(), site.beside("tree"));
    site.export(&["--patch", file, "--tree", tree.to_str().unwrap()]);
    assert_eq!(
        has_git.then(|| site.repository()),
        before,
        "the export changed the guest's repository"
    );
    site.assert_is_guests(&tree);

    let patch = fs::read(file).unwrap();
    let text = String::from_utf8_lossy(&patch);
    assert_eq!(
        text.matches("GIT binary patch").count(),
        2,
        "the patch has one new and one changed binary file"
    );
    for what in [
        "old mode 100755\nnew mode 100644",
        "old mode 100644\nnew mode 100755",
        "deleted file mode",
        "new file mode 120000",
    ] {
        assert!(text.contains(what), "{what:?} is not in {text}");
    }
    for name in users {
        assert!(
            !touched(&text).iter().any(|line| line.starts_with(name)),
            "{name}, which the user changed, is in {text}"
        );
    }
    let host_index = has_git.then(|| site.git(&["ls-files", "-s"]));
    let out = site.fcctl(&["workspace", "apply", site.vm]);
    assert!(out.status.success(), "{:?}", crate::host::text(&out));
    site.assert_same_tree();
    assert_eq!(
        has_git.then(|| site.git(&["ls-files", "-s"])),
        host_index,
        "apply does not change the index"
    );

    refuses_what_is_there(site, file, &patch, tree.to_str().unwrap());
}

#[track_caller]
fn refuses_what_is_there(site: &Site, file: &str, patch: &[u8], tree: &str) {
    for args in [["--patch", file], ["--tree", tree]] {
        let out = site.fcctl(&["workspace", "export", site.vm, args[0], args[1]]);
        let said = text(&out).1;
        assert_eq!(out.status.code(), Some(4), "{said}");
        assert!(said.contains(args[1]) && said.contains("hint: "), "{said}");
    }
    assert_eq!(
        fs::read(file).unwrap(),
        patch,
        "a refused export does not change the existing file"
    );
    site.assert_is_guests(tree.as_ref());
}

#[test]
fn changes_in_guest_are_exported() {
    let host = Host::start();
    host.boot("box");
    from_a_clean_tree(&host);
    from_a_dirty_tree(&host);
    from_an_unborn_tree(&host);
    from_a_tree_without_git(&host);
    from_a_tree_that_git_converts(&host);
    run_with_export_patch(&host);
    a_repository_made_in_the_guest(&host);
    files_under_a_filter(&host);
}

fn from_a_clean_tree(host: &Host) {
    let site = Site::unborn(host, "box", "clean");
    fill(&site);
    site.commit("all");
    there_and_back(&site, true, &[]);
}

fn from_a_dirty_tree(host: &Host) {
    let site = Site::unborn(host, "box", "dirty");
    fill(&site);
    for name in ["users-edit", "users-staged", "users-deleted", "users-mode"] {
        site.write(name, "as committed\n");
    }
    site.write(".gitignore", "*.o\n");
    site.commit("all");
    site.write("a", "one\ntwo\nthe user's\n");
    site.write("later", "staged by the user\n");
    site.git(&["add", "later"]);
    site.write("users-edit", "edited\n");
    site.write("users-staged", "staged\n");
    site.git(&["add", "users-staged"]);
    fs::remove_file(site.path("users-deleted")).unwrap();
    site.chmod("users-mode", 0o755);
    site.write("users-new", "untracked\n");
    there_and_back(&site, true, &["users-"]);
    // An export does not contain ignored files.
    site.in_guest("echo x > made.o");
    assert!(!String::from_utf8_lossy(&site.export(&["--patch", "-"]).0).contains("made.o"));
}

fn from_an_unborn_tree(host: &Host) {
    let site = Site::unborn(host, "box", "unborn");
    fill(&site);
    site.git(&["add", "a", "dir", "plain"]);
    there_and_back(&site, true, &["crlf", "old"]);
}

fn from_a_tree_without_git(host: &Host) {
    let site = Site::plain(host, "box", "plain");
    fill(&site);
    site.write("x.o", "nothing is ignored here");
    fs::create_dir(site.path("with nothing in it")).unwrap();
    there_and_back(&site, false, &["x.o", "crlf"]);
}

/// The exported content is the guest's, although git converts UTF-16, `ident`, filtered content and
/// line endings.
fn from_a_tree_that_git_converts(host: &Host) {
    let site = Site::unborn(host, "box", "converted");
    site.git(&["config", "filter.shout.clean", "tr A-Z a-z"]);
    site.git(&["config", "filter.shout.smudge", "tr a-z A-Z"]);
    let attributes = "*.rc text working-tree-encoding=UTF-16LE\n*.id ident\n*.dos text eol=crlf\n*.loud filter=shout\n";
    site.write(".gitattributes", attributes);
    site.write("a.rc", "o\0n\0e\0\n\0");
    site.write("a.id", "$Id$\none\n");
    site.write("a.dos", "one\r\n");
    site.write("a.loud", "ONE\n");
    site.commit("all");
    fs::remove_file(site.path("a.id")).unwrap();
    site.git(&["checkout", "-q", "--", "a.id"]);
    site.prepare();
    site.in_guest(
        r"printf 't\0w\0o\0\n\0' >> a.rc; cp a.rc new.rc; echo two >> a.id; cp a.id new.id; printf 'two\r\n' >> a.dos
        printf 'lf\n' > new.dos; echo TWO >> a.loud; echo lower > new.loud",
    );
    let out = site.fcctl(&["workspace", "apply", site.vm, "--dry-run"]);
    assert!(
        out.status.success() && text(&out).0.contains("8 files would change"),
        "{:?}",
        text(&out)
    );
    assert!(!site.path("new.rc").exists());
    let out = site.fcctl(&["workspace", "apply", site.vm]);
    assert!(out.status.success(), "{:?}", text(&out));
    site.assert_same_tree();
}

/// An export brings back the files of a repository made in the guest and reports its history. The
/// next import keeps the repository, and because of the repository, `run --rm` keeps the VM.
fn a_repository_made_in_the_guest(host: &Host) {
    let site = Site::unborn(host, "box", "nested");
    site.write("a", "one\n");
    site.commit("all");
    site.prepare();
    site.in_guest("mkdir -p svc/deep; echo work > svc/deep/main.go; cd svc; git init -q; git add -A; git -c user.name=g -c user.email=g@g commit -qm inner");
    let out = site.fcctl(&["workspace", "apply", site.vm]);
    assert!(
        out.status.success() && text(&out).1.contains("  svc/.git: "),
        "{:?}",
        text(&out)
    );
    site.write("svc/deep/main.go", "changed here\n");
    site.in_guest("echo 'changed there' > svc/deep/main.go; git init -q tool");
    site.write("tool", "a file here\n");
    let said = site.prepare();
    assert!(
        said.contains("  svc/.git\n") && said.contains("  tool\n"),
        "{said}"
    );
    assert_eq!(
        site.said_in_guest("cat svc/deep/main.go; git -C svc log --format=%s; ls -d tool/.git"),
        "changed there\ninner\ntool/.git\n"
    );

    let site = Site::unborn(host, "kept", "kept");
    site.write("a", "one\n");
    site.commit("all");
    let file = site.beside("kept.patch");
    let script = "git init -q svc; echo work > svc/main.go";
    let args = [
        "run",
        ".",
        "--rm",
        "--name",
        "kept",
        "--export-patch",
        file.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        script,
    ];
    let out = site.fcctl(&args);
    assert_eq!(out.status.code(), Some(125), "{:?}", text(&out));
    assert!(
        text(&out).1.contains("VM kept is kept despite --rm"),
        "{:?}",
        text(&out)
    );
    assert!(fs::read_to_string(&file).unwrap().contains("+work"));
    assert_eq!(host.ok(&["exec", "kept", "--", "ls", "svc"]), "main.go\n");
    let script = "git init -q svc";
    let out = site.fcctl(&[
        "run", ".", "--rm", "--name", "gone", "--", "sh", "-c", script,
    ]);
    assert_eq!(out.status.code(), Some(0), "{:?}", text(&out));
    assert!(!host.ok(&["ps", "-aq", "--json"]).contains("gone"));
}

/// No filter runs. The guest's git shows no difference, and it cannot commit files that the filter
/// would have changed.
fn files_under_a_filter(host: &Host) {
    let site = Site::unborn(host, "box", "filtered");
    site.git(&["config", "filter.crypt.clean", "rev"]);
    site.git(&["config", "filter.crypt.smudge", "rev"]);
    site.git(&["config", "filter.crypt.required", "true"]);
    site.write(".gitattributes", "secret/* filter=crypt\n");
    site.write("secret/key", "plaintext\n");
    site.write("a", "one\n");
    site.commit("all");
    site.on_host("touch -d '1 hour ago' secret/key; git update-index --refresh");
    let said = site.prepare();
    assert!(said.contains("crypt (1 file)"), "{said}");
    assert_eq!(site.said_in_guest("git status --porcelain"), "");
    let out = site.in_guest_out("echo 'of the guest' > secret/key; git add secret/key");
    assert!(
        !out.status.success()
            && text(&out)
                .1
                .contains("its filter (crypt) does not run in this VM"),
        "{:?}",
        text(&out)
    );
    site.in_guest("echo two >> a; git add a; git commit -qm work");
    assert!(
        site.fcctl(&["workspace", "apply", site.vm])
            .status
            .success()
    );
    site.assert_same_tree();
}

/// `run PATH --export-patch FILE` writes the patch before `--rm` deletes the VM.
fn run_with_export_patch(host: &Host) {
    let site = Site::unborn(host, "box", "run");
    fill(&site);
    site.commit("all");
    let file = site.beside("run.patch");
    let args = [
        "run",
        ".",
        "--rm",
        "--export-patch",
        file.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        "echo from the guest >> a",
    ];
    let out = site.fcctl(&args);
    assert!(out.status.success(), "{:?}", text(&out));
    assert!(
        text(&out)
            .1
            .contains(&format!("git --git-dir= apply {}", file.display())),
        "{:?}",
        text(&out)
    );
    site.git(&["--git-dir=", "apply", file.to_str().unwrap()]);
    assert_eq!(
        fs::read_to_string(site.path("a")).unwrap(),
        "one\ntwo\nfrom the guest\n"
    );
    assert_eq!(
        host.ok(&["ps", "-aq"]).lines().count(),
        1,
        "--rm has deleted the VM"
    );
}
