//! Tests that modification times survive the round trip.

use super::*;
use std::os::unix::fs::symlink;

/// Modification times in seconds and nanoseconds. They are before 1970, at the epoch, today, beyond
/// 32 bits, beyond 64 bits of nanoseconds (2262), and the latest time of ext4.
const TIMES: [(i64, i64); 8] = [
    (-315_619_200, 0),
    (-1, 500_000_001),
    (0, 0),
    (0, 1),
    (1_700_000_000, 123_456_789),
    (5_000_000_000, 999_999_999),
    (10_413_792_000, 7),
    (15_000_000_000, 0),
];

fn set(path: &Path, (seconds, nanoseconds): (i64, i64)) {
    let time = rustix::fs::Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(
        rustix::fs::CWD,
        path,
        &times,
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )
    .unwrap();
}

/// Returns the modification times of every file and link, except git's own, and with `dirs` of
/// every directory.
fn times(root: &Path, dirs: bool) -> BTreeMap<PathBuf, (i64, i64)> {
    let mut out = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for item in std::fs::read_dir(&dir).unwrap() {
            let path = item.unwrap().path();
            let below = path.strip_prefix(root).unwrap().to_owned();
            let meta = std::fs::symlink_metadata(&path).unwrap();
            if below.starts_with(".git") {
                continue;
            }
            if meta.is_dir() {
                pending.push(path);
            }
            if dirs || !meta.is_dir() {
                out.insert(below, (meta.mtime(), meta.mtime_nsec()));
            }
        }
    }
    out
}

/// Creates one file of each type for each time, and sets the directories' times last.
fn fill(root: &Path) {
    for (i, time) in TIMES.iter().enumerate() {
        let long = format!("{}/{}", "d".repeat(150), "n".repeat(200));
        for name in [
            format!("file {i}"),
            format!("dir {i}/file"),
            format!("{long}{i}"),
        ] {
            write(root, &name, &name);
            set(&root.join(name), *time);
        }
        write(root, &format!("big {i}"), vec![7; 70_000]);
        set(&root.join(format!("big {i}")), *time);
        symlink("x".repeat(60 + i * 20), root.join(format!("link {i}"))).unwrap();
        set(&root.join(format!("link {i}")), *time);
        let holes = root.join(format!("holes {i}"));
        std::fs::File::create(&holes)
            .unwrap()
            .set_len(1 << 22)
            .unwrap();
        write_at(&holes, 1 << 21);
        set(&holes, *time);
    }
    for (i, time) in TIMES.iter().enumerate() {
        set(&root.join(format!("dir {i}")), *time);
    }
}

fn write_at(path: &Path, offset: u64) {
    use std::os::unix::fs::FileExt;
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .write_all_at(b"data", offset)
        .unwrap();
}

#[test]
fn times_of_every_age_survive_the_round_trip() {
    for has_git in [true, false] {
        let site = if has_git {
            Site::unborn()
        } else {
            Site::plain()
        };
        fill(&site.host());
        site.prepare();
        site.assert_same_tree();
        assert_eq!(
            times(&site.host(), !has_git),
            times(&site.guest(), !has_git)
        );
        assert_eq!(site.export_patch().unwrap(), (Vec::new(), 0));
        for name in ["made/in the guest", "made/again"] {
            site.write_guest(name, "x");
            set(&site.guest().join(name), (-86_400, 1));
        }
        set(&site.guest().join("made"), (12_000_000_000, 5));
        let out = site.dir.path().join("out");
        unpack_tree(&site.export_tree().unwrap(), &out).unwrap();
        assert_eq!(listing(&site.guest()), listing(&out));
        assert_eq!(times(&site.guest(), !has_git), times(&out, !has_git));
    }
}

#[test]
fn time_of_a_whole_second_needs_no_extra_header() {
    let site = Site::plain();
    let send = |site: &Site| {
        let mut payload = Vec::new();
        site.plan()
            .unwrap()
            .send(&mut payload, &[], &mut |_, _| {}, &cancel())
            .unwrap();
        payload.len()
    };
    site.write("x", "x");
    set(&site.path("x"), (1_700_000_000, 0));
    let before = send(&site);
    set(&site.path("x"), (1_700_000_000, 1));
    assert_eq!(send(&site), before + 1024);
}
