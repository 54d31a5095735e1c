use super::*;
use crate::error::Kind;
use std::os::unix::fs::symlink;

#[test]
fn hostile_repository_runs_nothing() {
    let site = Site::committed();
    let canary = site.dir.path().join("canary");
    let script = format!("#!/bin/sh\ntouch {}\n", canary.display());
    site.write("evil", &script);
    site.chmod("evil", 0o755);
    let evil = site.path("evil");
    let evil = evil.to_str().unwrap();
    site.write(".gitattributes", "* filter=x diff=x\n");
    site.commit("attributes");
    for hook in [
        "post-index-change",
        "pre-auto-gc",
        "reference-transaction",
        "post-checkout",
    ] {
        site.write(&format!(".git/hooks/{hook}"), &script);
        site.chmod(&format!(".git/hooks/{hook}"), 0o755);
    }
    for key in [
        "core.fsmonitor",
        "filter.x.clean",
        "filter.x.smudge",
        "filter.x.process",
        "diff.x.textconv",
        "diff.external",
        "core.pager",
        "core.sshCommand",
        "core.alternateRefsCommand",
        "uploadpack.packObjectsHook",
        "core.editor",
        "gpg.program",
        "credential.helper",
    ] {
        site.git(&["config", key, evil]);
    }
    site.git(&["config", "protocol.ext.allow", "always"]);
    site.git(&["config", "remote.origin.url", &format!("ext::{evil}")]);
    site.git(&["config", "remote.origin.promisor", "true"]);
    site.git(&["config", "extensions.partialClone", "origin"]);
    let _ = std::fs::remove_file(&canary);
    site.write("a", "touched, so that its filter would be asked\n");
    // A partial clone would fetch this missing blob.
    let blob = site.git(&["-c", "core.fsmonitor=false", "rev-parse", "HEAD:dir/b"]);
    std::fs::remove_file(site.path(format!(".git/objects/{}/{}", &blob[..2], blob[2..].trim())))
        .unwrap();
    let _ = std::fs::remove_file(&canary);
    let mut plan = site.plan().unwrap();
    assert!(plan.warnings().iter().any(|w| w.contains("partial clone")));
    site.prepare_with(&mut plan, false).unwrap();
    assert!(!canary.exists(), "something of the repository ran");
    // The guest's only hook is fcd's, which prevents commits of the raw content of filtered files.
    let hooks: Vec<_> = std::fs::read_dir(site.guest().join(".git/hooks"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(hooks, ["pre-commit"]);
    let hook = std::fs::read_to_string(site.guest().join(".git/hooks/pre-commit")).unwrap();
    assert!(
        hook.contains("fcd/check") && !hook.contains("canary"),
        "{hook}"
    );
    let config = std::fs::read_to_string(site.guest().join(".git/config")).unwrap();
    assert!(
        !config.contains("evil") && !config.contains("url"),
        "{config}"
    );
    assert!(site.git_guest(&["log", "--format=%s"]).contains("first"));
    let (patch, changed) = site.export_patch().unwrap();
    assert_eq!(changed, 0, "{}", String::from_utf8_lossy(&patch));
}

#[test]
fn git_file_that_leads_to_another_repository_is_refused() {
    let private = Site::committed();
    let site = Site::plain();
    site.write(
        ".git",
        format!("gitdir: {}\n", private.path(".git").display()),
    );
    let e = site.plan().err().unwrap();
    assert_eq!(e.kind(), Kind::InvalidTree);
    assert!(e.to_string().contains("does not belong"), "{e}");
    std::fs::remove_file(site.path(".git")).unwrap();
    symlink(private.path(".git"), site.path(".git")).unwrap();
    assert_eq!(site.plan().err().unwrap().kind(), Kind::InvalidTree);
    std::fs::remove_file(site.path(".git")).unwrap();
    site.git(&["init", "-q"]);
    site.git(&["config", "core.worktree", private.host().to_str().unwrap()]);
    assert_eq!(site.plan().err().unwrap().kind(), Kind::InvalidTree);
}

#[test]
fn ignore_files_that_a_repository_names_are_not_sent() {
    let site = Site::committed();
    let secret = site.dir.path().join("secret");
    std::fs::write(&secret, "top secret\n*.o\n").unwrap();
    site.git(&["config", "core.excludesFile", secret.to_str().unwrap()]);
    site.write("x.o", "ignored");
    let mut payload = Vec::new();
    let mut plan = site.plan().unwrap();
    plan.send(&mut payload, &[], &mut |_, _| {}, &cancel())
        .unwrap();
    assert!(!payload.windows(10).any(|w| w == b"top secret"));
    assert!(!payload.windows(4).any(|w| w == b"x.o\0"));
    assert!(plan.warnings()[0].contains("not sent"));
    for name in ["exclude", "attributes"] {
        std::fs::create_dir_all(site.path(".git/info")).unwrap();
        let _ = std::fs::remove_file(site.path(format!(".git/info/{name}")));
        symlink(&secret, site.path(format!(".git/info/{name}"))).unwrap();
        let e = site.plan().err().unwrap();
        assert!(
            e.to_string().contains(&format!("info/{name} leads to")),
            "{e}"
        );
        std::fs::remove_file(site.path(format!(".git/info/{name}"))).unwrap();
    }
}

/// Checks that an archive with these entries is rejected with this error and leaves nothing behind.
#[track_caller]
fn check_refused(build: impl FnOnce(&mut Vec<u8>), want: Kind, word: &str) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("victim"), "safe").unwrap();
    let mut tar = Vec::new();
    entry(&mut tar, b'0', b"good", b"", b"good");
    build(&mut tar);
    tar.extend([0; 1024]);
    let e = unpack_tree(&tar, &dir.path().join("out")).unwrap_err();
    assert_eq!(e.kind(), want, "{e}");
    assert!(e.to_string().contains(word), "{e}");
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|i| i.unwrap().file_name())
        .collect();
    assert_eq!(left, ["victim"], "{word}");
    assert_eq!(std::fs::read(dir.path().join("victim")).unwrap(), b"safe");
}

fn entry(out: &mut Vec<u8>, kind: u8, name: &[u8], link: &[u8], data: &[u8]) {
    raw_entry(out, kind, name, link, data.len() as u64, data);
}

fn raw_entry(out: &mut Vec<u8>, kind: u8, name: &[u8], link: &[u8], size: u64, data: &[u8]) {
    let mut h = tar::Header::new_gnu();
    h.set_entry_type(tar::EntryType::new(kind));
    h.set_mode(0o7777);
    h.set_mtime(1);
    h.set_size(size);
    let g = h.as_gnu_mut().unwrap();
    g.name[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
    g.linkname[..link.len()].copy_from_slice(link);
    h.set_cksum();
    out.extend(h.as_bytes());
    out.extend(data);
    out.resize(out.len().next_multiple_of(512), 0);
}

#[test]
fn unpack_name_outside_the_tree_is_rejected() {
    for name in [
        &b"../victim"[..],
        b"/etc/x",
        b"a/../../victim",
        b"..",
        ".".as_bytes(),
        b"a//b",
        b"a/./b",
        b"",
        b"./x",
    ] {
        check_refused(
            |t| entry(t, b'0', name, b"", b"evil"),
            Kind::InvalidTree,
            "reject",
        );
    }
    check_refused(
        |t| entry(t, b'5', b"../x/", b"", b""),
        Kind::InvalidTree,
        "\"../x\"",
    );
    check_refused(
        |t| entry(t, b'0', b"a\n\x1b[2J/..", b"", b""),
        Kind::InvalidTree,
        "a%0A%1B[2J/..",
    );
}

#[test]
fn unpack_git_file_is_rejected() {
    for name in [&b".git/hooks/post-checkout"[..], b"x/.GIT/config", b".git"] {
        check_refused(
            |t| entry(t, b'0', name, b"", b"evil"),
            Kind::InvalidTree,
            "git's own",
        );
    }
}

#[test]
fn unpack_writes_nothing_through_links() {
    for target in [&b".."[..], b"/", b"good"] {
        let through = |t: &mut Vec<u8>| {
            entry(t, b'2', b"l", target, b"");
            entry(t, b'0', b"l/victim", b"", b"evil");
        };
        check_refused(through, Kind::InvalidTree, "l/victim");
        // One archive replaces the link with a file, and another replaces it with a directory.
        let over = |t: &mut Vec<u8>| {
            entry(t, b'2', b"l", b"../../victim", b"");
            entry(t, b'0', b"l", b"", b"evil");
        };
        check_refused(over, Kind::InvalidTree, "twice");
        let dir = |t: &mut Vec<u8>| {
            entry(t, b'2', b"l", target, b"");
            entry(t, b'5', b"l/", b"", b"");
        };
        check_refused(dir, Kind::InvalidTree, "twice");
    }
    // The archive has two links, one of which leads through the other.
    let chain = |t: &mut Vec<u8>| {
        entry(t, b'2', b"one", b".", b"");
        entry(t, b'2', b"one/two", b"..", b"");
    };
    check_refused(chain, Kind::InvalidTree, "one/two");
}

#[test]
fn unpack_unexpected_entry_type_is_rejected() {
    for kind in [b'1', b'3', b'4', b'6', b'7', b'g', b'D', b'M', b'V', 0xff] {
        check_refused(
            |t| entry(t, kind, b"x", b"good", b""),
            Kind::InvalidTree,
            "reject",
        );
    }
}

/// Appends extended header records in POSIX format.
fn posix(t: &mut Vec<u8>, records: &[u8]) {
    entry(t, b'x', b"././@PaxHeader", b"", records);
}

/// Formats an extended header record: `<length> <key>=<value>`, followed by a line feed.
fn record(text: &str) -> Vec<u8> {
    let length = (1..200)
        .find(|n| n.to_string().len() + text.len() + 2 == *n)
        .unwrap();
    format!("{length} {text}\n").into_bytes()
}

#[test]
fn unpack_bad_extended_header_is_rejected() {
    let cases = [
        (record("path=../victim"), "../victim"),
        (record("path=/tmp/evil"), "absolute"),
        (record("path=x/.git/abc"), "git's own"),
        (record("mtime=abc"), "a time is invalid"),
        (record("size=-1"), "a size is invalid"),
        (record("evil=1"), "unknown key"),
        (record("GNU.sparse.major=2"), "unknown key"),
        (b"17 path=../victim\n".to_vec(), "damaged"),
        (b"19 path=../victim\n".to_vec(), "damaged"),
        (b"99999 path=x\n".to_vec(), "damaged"),
        (b"path=x\n".to_vec(), "damaged"),
        (b"8 mtime\n".to_vec(), "damaged"),
        (b"x".to_vec(), "damaged"),
    ];
    for (records, word) in cases {
        let hostile = |t: &mut Vec<u8>| {
            posix(t, &records);
            entry(t, b'0', b"x", b"", b"data");
        };
        check_refused(hostile, Kind::InvalidTree, word);
    }
    check_refused(
        |t| posix(t, &[b'1'; 200_000]),
        Kind::InvalidTree,
        "200000 bytes",
    );
    // These archives have records without an entry, and two sets of records.
    check_refused(
        |t| posix(t, &record("mtime=1")),
        Kind::InvalidTree,
        "end mark",
    );
    let twice = |t: &mut Vec<u8>| {
        posix(t, &record("mtime=1"));
        posix(t, &record("mtime=1"));
        entry(t, b'0', b"x", b"", b"");
    };
    check_refused(twice, Kind::InvalidTree, "reject");
}

#[test]
fn unpack_bad_list_of_holes_is_rejected() {
    let sparse = [
        "GNU.sparse.major=1",
        "GNU.sparse.minor=0",
        "GNU.sparse.realsize=1000",
    ]
    .map(record)
    .concat();
    let cases: [(&[u8], &str); 8] = [
        (b"1\n0\n1001\n", "overlap"),
        (b"2\n0\n10\n5\n10\n", "overlap"),
        (b"1\n0\n10\n", "add up"),
        (b"9999999\n", "too many holes"),
        (b"x\n", "holes are damaged"),
        (b"111111111111111111111\n", "holes are damaged"),
        (b"99999999999999999999\n", "holes are damaged"),
        (b"3\n0\n1", "holes are damaged"),
    ];
    for (map, word) in cases {
        let hostile = |t: &mut Vec<u8>| {
            posix(t, &sparse);
            let mut data = map.to_vec();
            if !word.ends_with("damaged") || !map.starts_with(b"3") {
                data.resize(512, 0);
                data.extend_from_slice(b"more");
            }
            entry(t, b'0', b"x", b"", &data);
        };
        check_refused(hostile, Kind::InvalidTree, word);
    }
    let of_a_link = |t: &mut Vec<u8>| {
        posix(t, &sparse);
        entry(t, b'2', b"x", b"good", b"");
    };
    check_refused(of_a_link, Kind::InvalidTree, "holes");
}

#[test]
fn unpack_wrong_size_is_rejected() {
    let truncated = |t: &mut Vec<u8>| {
        raw_entry(t, b'0', b"x", b"", 1 << 40, b"short");
    };
    check_refused(truncated, Kind::Exhausted, "bytes");
    check_refused(
        |t| raw_entry(t, b'0', b"x", b"", 1 << 20, b"short"),
        Kind::StreamIncomplete,
        "middle of a file",
    );
    check_refused(
        |t| raw_entry(t, b'L', b"x", b"", 1 << 30, b""),
        Kind::InvalidTree,
        "a name has",
    );
    check_refused(
        |t| raw_entry(t, b'2', b"x", b"y", 512, b"data"),
        Kind::InvalidTree,
        "not a file",
    );
    let overlapping = |t: &mut Vec<u8>| {
        let mut h = tar::Header::new_gnu();
        h.set_entry_type(tar::EntryType::GNUSparse);
        h.set_mode(0o644);
        h.set_mtime(0);
        h.set_size(20);
        let g = h.as_gnu_mut().unwrap();
        g.name[0] = b'x';
        for slot in 0..2 {
            g.sparse[slot].offset.copy_from_slice(b"00000000000\0");
            g.sparse[slot].numbytes.copy_from_slice(b"00000000012\0");
        }
        g.realsize.copy_from_slice(b"00000000100\0");
        h.set_cksum();
        t.extend(h.as_bytes());
        t.extend([0; 512]);
    };
    check_refused(overlapping, Kind::InvalidTree, "overlap");
}

#[test]
fn unpack_truncated_or_longer_archive_is_rejected() {
    let mut tar = Vec::new();
    entry(&mut tar, b'0', b"x", b"", b"hello");
    let whole = [&tar[..], &[0; 1024]].concat();
    for cut in [0, 100, 512, 1024, 1536] {
        let dir = tempfile::tempdir().unwrap();
        let e = unpack_tree(&whole[..cut], &dir.path().join("out")).unwrap_err();
        assert_eq!(e.kind(), Kind::StreamIncomplete, "{cut}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
    let dir = tempfile::tempdir().unwrap();
    let longer = [&whole[..], &[1]].concat();
    assert!(unpack_tree(&longer, &dir.path().join("out")).is_err());
    let padded = [&whole[..], &[0; 8192]].concat();
    assert_eq!(
        unpack_tree(&padded, &dir.path().join("out"))
            .unwrap()
            .entries,
        1
    );
}

#[test]
fn unpack_drops_set_id_bits_and_keeps_empty_directories() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let mut tar = Vec::new();
    entry(&mut tar, b'0', b"suid", b"", b"x");
    entry(&mut tar, b'5', b"d/", b"", b"");
    tar.extend([0; 1024]);
    unpack_tree(&tar, &out).unwrap();
    assert_eq!(
        std::fs::metadata(out.join("suid")).unwrap().mode() & 0o7000,
        0
    );
    assert_eq!(std::fs::metadata(out.join("d")).unwrap().mode() & 0o7000, 0);
}

#[test]
fn unpack_beyond_limits_is_rejected() {
    let mut tar = Vec::new();
    for i in 0..5 {
        entry(
            &mut tar,
            b'0',
            format!("{i}").as_bytes(),
            b"",
            b"0123456789",
        );
    }
    tar.extend([0; 1024]);
    let dir = tempfile::tempdir().unwrap();
    for limits in [
        unpack::Limits {
            entries: 4,
            bytes: 1000,
        },
        unpack::Limits {
            entries: 10,
            bytes: 49,
        },
    ] {
        let e =
            unpack::stage(&mut &tar[..], &dir.path().join("out"), &limits, &cancel()).unwrap_err();
        assert_eq!(e.kind(), Kind::Exhausted);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn unpack_cancelled_returns_cancelled() {
    let site = Site::committed();
    let c = cancel();
    let mut plan = site.plan().unwrap();
    c.cancel(crate::locks::CancelCause::VmStopped);
    let e = plan
        .send(&mut Vec::new(), &[], &mut |_, _| {}, &c)
        .unwrap_err();
    assert_eq!(
        (e.kind(), e.to_string().contains("the VM was stopped")),
        (Kind::Cancelled, true)
    );
    assert_eq!(
        Plan::inspect(&site.host(), &site.options(History::default()), &c)
            .err()
            .unwrap()
            .kind(),
        Kind::Cancelled
    );
    struct Gone;
    impl std::io::Write for Gone {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let e = plan
        .send(&mut Gone, &[], &mut |_, _| {}, &cancel())
        .unwrap_err();
    assert_eq!(e.kind(), Kind::StreamIncomplete);
}
