use super::forward::forward;
use super::land::{Destination, Landed, Landing, land, resolve};
use super::list::list;
use super::pack::{Packing, pack};
use super::*;
use crate::error::Result;
use crate::workspace::unpack::Limits;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

fn cancel() -> Cancel {
    Cancel::try_new().unwrap()
}

/// An entry of a hostile tar.
struct Entry<'a> {
    kind: u8,
    name: &'a [u8],
    link: &'a [u8],
    data: &'a [u8],
}

fn file(name: &[u8]) -> Entry<'_> {
    Entry {
        kind: b'0',
        name,
        link: b"",
        data: b"theirs",
    }
}

fn dir(name: &[u8]) -> Entry<'_> {
    Entry {
        kind: b'5',
        data: b"",
        ..file(name)
    }
}

fn link<'a>(kind: u8, name: &'a [u8], link: &'a [u8]) -> Entry<'a> {
    Entry {
        kind,
        name,
        link,
        data: b"",
    }
}

fn tar_of(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(entry.kind));
        header.set_mode(0o6755);
        header.set_mtime(1);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(entry.data.len() as u64);
        let fields = header.as_gnu_mut().unwrap();
        fields.name[..entry.name.len()].copy_from_slice(entry.name);
        fields.linkname[..entry.link.len()].copy_from_slice(entry.link);
        header.set_cksum();
        out.extend(header.as_bytes());
        out.extend(entry.data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.extend([0; 1024]);
    out
}

/// A directory with `outside` beside the destination `to`, which has the file `to/mine`.
struct Site(tempfile::TempDir);

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("outside"), "safe").unwrap();
        fs::create_dir(dir.path().join("to")).unwrap();
        fs::write(dir.path().join("to/mine"), "mine").unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    /// Copies the content of a guest's directory into `to`.
    fn land(&self, archive: bool, entries: &[Entry<'_>]) -> Result<Landed> {
        let to = resolve(&self.path("to"), None, FileKind::Dir).unwrap();
        land_tar(&tar_of(entries), &to, archive)
    }

    #[track_caller]
    fn check_refused(&self, archive: bool, entries: &[Entry<'_>], kind: Kind, word: &str) {
        let e = self.land(archive, entries).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(word), "{e}");
        self.check_safe();
    }

    /// Checks that nothing but `to` has changed and that no temporary file is left.
    #[track_caller]
    fn check_safe(&self) {
        assert_eq!(fs::read(self.path("outside")).unwrap(), b"safe");
        assert_eq!(fs::metadata(self.path("outside")).unwrap().nlink(), 1);
        let mut names = names_in(self.0.path());
        names.retain(|name| name != "link" && name != "elsewhere");
        assert_eq!(names, ["outside", "to"]);
        assert_eq!(fs::metadata(self.path("to/mine")).unwrap().nlink(), 1);
        let left = names_in(&self.path("to"));
        assert!(
            left.iter().all(|name| !name.starts_with(".fcctl")),
            "{left:?}"
        );
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

fn land_tar(tar: &[u8], to: &Destination, archive: bool) -> Result<Landed> {
    let landing = Landing {
        archive,
        limits: Limits::default(),
    };
    land(&mut &tar[..], to, &landing, &mut |_| {}, &cancel())
}

#[test]
fn hostile_path_stays_below_destination() {
    for name in [
        &b"../outside"[..],
        b"/etc/x",
        b"./../outside",
        b"./a/../../outside",
        b"..",
        b"./..",
        b"a//b",
        b"./",
        b"",
        &[b'x'; 100],
    ] {
        let site = Site::new();
        let long = [b"./".as_slice(), name].concat();
        let name = if name.len() == 100 { &long[..90] } else { name };
        match site.land(false, &[file(name)]) {
            Ok(_) => assert_eq!(name.len(), 90),
            Err(e) => assert_eq!(e.kind(), Kind::InvalidTree, "{name:?} {e}"),
        }
        site.check_safe();
    }
}

#[test]
fn no_link_is_followed() {
    let through = [link(b'2', b"./l", b".."), file(b"./l/outside")];
    Site::new().check_refused(false, &through, Kind::TargetExists, "in its way");
    let onto = [link(b'2', b"./l", b"../outside"), file(b"./l")];
    let site = Site::new();
    site.land(false, &onto).unwrap();
    site.check_safe();
    assert!(fs::symlink_metadata(site.path("to/l")).unwrap().is_file());
    let as_dir = [link(b'2', b"./l", b".."), dir(b"./l"), file(b"./l/x")];
    Site::new().check_refused(false, &as_dir, Kind::TargetExists, "not a directory");
    // Links that already exist in the destination are not followed either.
    let site = Site::new();
    fs::create_dir(site.path("elsewhere")).unwrap();
    symlink(site.path("elsewhere"), site.path("to/l")).unwrap();
    site.check_refused(false, &[file(b"./l/x")], Kind::TargetExists, "in its way");
    assert_eq!(names_in(&site.path("elsewhere")).len(), 0);
    // The destination itself may be a link, because the caller named it.
    symlink(site.path("to"), site.path("link")).unwrap();
    let to = resolve(&site.path("link"), Some(b"d"), FileKind::Dir).unwrap();
    land_tar(&tar_of(&[dir(b"."), file(b"./x")]), &to, false).unwrap();
    assert_eq!(fs::read(site.path("to/d/x")).unwrap(), b"theirs");
}

#[test]
fn hard_link_leads_to_file_of_this_copy_only() {
    for target in [
        &b"./mine"[..],
        b"mine",
        b"../outside",
        b"/etc/passwd",
        b"./none",
        b"./d",
    ] {
        let entries = [dir(b"./d"), link(b'1', b"./h", target)];
        Site::new().check_refused(true, &entries, Kind::InvalidTree, "");
    }
    let through = [
        link(b'2', b"./l", b"../outside"),
        link(b'1', b"./h", b"./l"),
    ];
    Site::new().check_refused(true, &through, Kind::InvalidTree, "another file");
    let site = Site::new();
    let twice = [
        file(b"./a"),
        link(b'1', b"./b", b"./a"),
        link(b'1', b"./b", b"./a"),
    ];
    site.land(true, &twice).unwrap();
    site.check_safe();
    assert_eq!(fs::metadata(site.path("to/b")).unwrap().nlink(), 2);
    // Without -a, the guest's tar has no hard links.
    site.check_refused(false, &twice, Kind::InvalidTree, "another file");
}

#[test]
fn devices_are_skipped_and_named_and_set_id_bits_dropped() {
    for archive in [false, true] {
        let site = Site::new();
        let mut entries = vec![
            file(b"./suid"),
            link(b'6', b"./fifo", b""),
            link(b'3', b"./c", b""),
        ];
        let names: Vec<Vec<u8>> = (0..30).map(|n| format!("./b{n}").into_bytes()).collect();
        entries.extend(names.iter().map(|name| link(b'4', name, b"")));
        let landed = site.land(archive, &entries).unwrap();
        assert_eq!(landed.copied.entries, 1);
        assert!(landed.warnings[0].ends_with("to/fifo: it is a FIFO"));
        assert_eq!(landed.warnings.len(), 21);
        assert_eq!(landed.warnings[20], "skipped 12 more devices and FIFOs");
        let mode = fs::metadata(site.path("to/suid")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o755);
        assert_eq!(names_in(&site.path("to")), ["mine", "suid"]);
    }
}

#[test]
fn one_file_is_not_several_and_not_a_directory() {
    let site = Site::new();
    let to = resolve(&site.path("to"), Some(b"x"), FileKind::File).unwrap();
    for entries in [
        &[dir(b"./x"), file(b"./x/y")][..],
        &[file(b"./x"), file(b"./mine")],
        &[file(b"./x"), file(b"../outside")],
    ] {
        let e = land_tar(&tar_of(entries), &to, false).unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidTree);
        site.check_safe();
        assert_eq!(fs::read(site.path("to/mine")).unwrap(), b"mine");
    }
    // The guest's name for the file does not matter.
    land_tar(&tar_of(&[file(b"../../outside")]), &to, false).unwrap();
    site.check_safe();
    assert_eq!(fs::read(site.path("to/x")).unwrap(), b"theirs");
}

#[test]
fn kinds_that_differ_are_named() {
    let site = Site::new();
    fs::create_dir(site.path("to/d")).unwrap();
    site.check_refused(
        false,
        &[file(b"./d")],
        Kind::TargetExists,
        "d: it is a directory",
    );
    site.check_refused(
        false,
        &[link(b'2', b"./d", b"x")],
        Kind::TargetExists,
        "d: it is a directory",
    );
    site.check_refused(
        false,
        &[dir(b"./mine")],
        Kind::TargetExists,
        "/to: mine: it exists",
    );
    assert_eq!(fs::read(site.path("to/mine")).unwrap(), b"mine");
}

#[test]
fn archive_that_is_cut_off_leaves_whole_files_only() {
    let big = vec![7; 10_000];
    let entries = [
        file(b"./first"),
        Entry {
            data: &big,
            ..file(b"./mine")
        },
    ];
    let tar = tar_of(&entries);
    for cut in (0..tar.len()).step_by(256) {
        let site = Site::new();
        let to = resolve(&site.path("to"), None, FileKind::Dir).unwrap();
        let e = land_tar(&tar[..cut], &to, false).unwrap_err();
        assert_eq!(e.kind(), Kind::StreamIncomplete, "{cut}");
        site.check_safe();
        let mine = fs::read(site.path("to/mine")).unwrap();
        assert!(mine == b"mine" || mine == big, "{cut}");
    }
}

#[test]
fn limits_of_bytes_and_entries_hold() {
    let site = Site::new();
    let to = resolve(&site.path("to"), None, FileKind::Dir).unwrap();
    let tar = tar_of(&[file(b"./a"), file(b"./b")]);
    for limits in [
        Limits {
            bytes: 10,
            ..Limits::default()
        },
        Limits {
            entries: 1,
            ..Limits::default()
        },
    ] {
        let landing = Landing {
            archive: false,
            limits,
        };
        let e = land(&mut &tar[..], &to, &landing, &mut |_| {}, &cancel()).unwrap_err();
        assert_eq!(e.kind(), Kind::Exhausted);
        assert_eq!(names_in(&site.path("to")), ["a", "mine"]);
    }
}

#[test]
fn directory_without_rights_gets_its_mode_at_the_end() {
    let site = Site::new();
    let mut tar = tar_of(&[dir(b"./d"), file(b"./d/x")]);
    let mut header = tar::Header::new_gnu();
    header.clone_from(tar::Header::from_byte_slice(&tar[..512]));
    header.set_mode(0o500);
    header.set_cksum();
    tar[..512].copy_from_slice(header.as_bytes());
    let to = resolve(&site.path("to"), None, FileKind::Dir).unwrap();
    land_tar(&tar, &to, false).unwrap();
    let found = fs::metadata(site.path("to/d")).unwrap();
    assert_eq!((found.mode() & 0o777, found.mtime()), (0o500, 1));
    fs::set_permissions(site.path("to/d"), fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn device_as_destination_is_not_replaced() {
    // A link of the system is not replaced even if it leads to a file.
    for path in [
        "/dev/null",
        "/dev/stdout",
        "/dev/../dev/stdout",
        "/proc/self/exe",
    ] {
        let e = resolve(Path::new(path), Some(b"x"), FileKind::File).unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidArgument, "{path}");
        assert!(e.hint_text().unwrap().contains("fcctl exec"));
    }
}

#[test]
fn forwarded_tar_ends_with_the_last_entry() {
    let tar = tar_of(&[file(b"./a"), dir(b"./b")]);
    let padded = [&tar[..], &[0; 9000]].concat();
    for input in [&tar, &padded] {
        let mut out = Vec::new();
        let copied = forward(
            &mut &input[..],
            &mut out,
            Some("last"),
            &mut |_| {},
            &cancel(),
        );
        assert_eq!(copied.unwrap().entries, 2);
        let mut archive = tar::Archive::new(&out[..]);
        let names: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path_bytes().into_owned())
            .collect();
        assert_eq!(names, [&b"./a"[..], b"./b", b"last"]);
    }
    // The first block of the end mark shows that nothing is missing.
    for cut in (0..tar.len() - 512).step_by(100) {
        let mut out = Vec::new();
        let cut = &tar[..cut];
        let e = forward(
            &mut &cut[..],
            &mut out,
            Some("last"),
            &mut |_| {},
            &cancel(),
        );
        assert_eq!(e.unwrap_err().kind(), Kind::StreamIncomplete);
        assert!(!out.windows(4).any(|w| w == b"last"));
    }
    let e = forward(
        &mut &[1; 2000][..],
        &mut Vec::new(),
        None,
        &mut |_| {},
        &cancel(),
    );
    assert_eq!(e.unwrap_err().kind(), Kind::InvalidTree);
}

#[test]
fn names_follow_rules_of_cp() {
    for (path, name) in [
        ("a", Some("a")),
        ("/x/a/", Some("a")),
        ("a//", Some("a")),
        ("/", None),
        ("a/.", None),
        ("a/./", None),
        ("..", None),
        (".", None),
        ("a/..b", Some("..b")),
    ] {
        assert_eq!(name_of(path.as_bytes()), name.map(str::as_bytes), "{path}");
    }
    assert!(must_be_dir(b"a/") && must_be_dir(b"a/.") && !must_be_dir(b"a"));
}

#[test]
fn what_cannot_be_sent_is_named_before_anything_is_sent() {
    let site = Site::new();
    nix::unistd::mkfifo(&site.path("to/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let listing = list(&site.path("to"), false, &cancel()).unwrap();
    assert!(listing.warnings[0].ends_with("to/fifo: it is a FIFO"));
    for (path, kind) in [
        ("to/fifo", Kind::InvalidArgument),
        ("none", Kind::PathNotFound),
        ("outside/", Kind::InvalidArgument),
        ("outside/x", Kind::InvalidArgument),
    ] {
        let e = list(&site.path(path), false, &cancel()).unwrap_err();
        assert_eq!(e.kind(), kind, "{path} {e}");
    }
}

#[test]
fn packed_hard_links_are_links_with_archive_only() {
    let site = Site::new();
    fs::hard_link(site.path("to/mine"), site.path("to/other")).unwrap();
    let listing = list(&site.path("to"), false, &cancel()).unwrap();
    let kinds = |archive| {
        let mut out = Vec::new();
        let packing = Packing {
            archive,
            last: "last".to_owned(),
        };
        let packed = pack(
            std::slice::from_ref(&listing),
            &packing,
            &mut out,
            &mut |_| {},
            &cancel(),
        );
        assert_eq!(packed.unwrap().copied.entries, 3);
        let mut archive = tar::Archive::new(&out[..]);
        let kind =
            |e: std::io::Result<tar::Entry<'_, &[u8]>>| e.unwrap().header().entry_type().as_byte();
        archive.entries().unwrap().map(kind).collect::<Vec<_>>()
    };
    assert_eq!(kinds(false), b"5000");
    assert_eq!(kinds(true), b"5010");
}
