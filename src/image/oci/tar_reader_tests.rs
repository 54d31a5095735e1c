use super::super::layer::{LayerIndex, index};
use super::super::test_tar::{
    Item, MTIME, cut_tar, device, dir, file, hardlink, item, record, seal, symlink, tar,
};
use super::*;
use crate::error::Error;

fn read(tar: &[u8]) -> Result<LayerIndex> {
    index(std::io::BufReader::new(tar), &Budget::new(1 << 30))
}

#[track_caller]
fn entries(items: &[Item]) -> Vec<Entry> {
    read(&tar(items)).unwrap().entries
}

#[track_caller]
fn refused(tar: &[u8], message: &str) -> Error {
    let error = read(tar).unwrap_err();
    assert!(error.to_string().contains(message), "{error}");
    error
}

#[test]
fn entries_of_all_kinds_are_read() {
    let long = format!("{}/end", "d".repeat(200));
    let items = [
        dir("./").mode(0o1777),
        file("./a", "some text")
            .owner(1000, 3_000_000_000)
            .mtime(-5),
        hardlink("b", "./a"),
        symlink("c", "../elsewhere"),
        device(b'3', "dev/c", 4, 300),
        device(b'4', "dev/b", 8, 1),
        item(b'6', "fifo"),
        file(&long, "")
            .xattr("user.a", b"\0\xff")
            .pax("mtime", b"1.5"),
        symlink("l", &"t".repeat(300)),
        file("last", "x"),
    ];
    let found = entries(&items);
    let kinds: Vec<&EntryKind> = found.iter().map(|entry| &entry.kind).collect();
    assert_eq!(&*found[0].path, "");
    assert_eq!(found[0].attributes.mode, 0o1777);
    let file = |offset, bytes| EntryKind::File { offset, bytes };
    assert_eq!(*kinds[1], file(1024, 9));
    let attributes = &found[1].attributes;
    assert_eq!((attributes.uid, attributes.gid), (1000, 3_000_000_000));
    assert_eq!(attributes.mtime.seconds, -5);
    assert_eq!(*kinds[2], EntryKind::HardLink { target: "a".into() });
    assert_eq!(
        *kinds[3],
        EntryKind::Symlink {
            target: "../elsewhere".into()
        }
    );
    assert_eq!(
        *kinds[4],
        EntryKind::CharacterDevice {
            major: 4,
            minor: 300
        }
    );
    assert_eq!(*kinds[5], EntryKind::BlockDevice { major: 8, minor: 1 });
    assert_eq!(*kinds[6], EntryKind::Fifo);
    assert_eq!(&*found[7].path, long);
    assert_eq!(&*found[7].attributes.xattrs[0].value, b"\0\xff");
    assert_eq!(found[7].attributes.mtime.nanoseconds, 500_000_000);
    assert_eq!(
        *kinds[8],
        EntryKind::Symlink {
            target: "t".repeat(300).into()
        }
    );
    assert_eq!(found[9].attributes.mtime.seconds, MTIME);
}

#[test]
fn offsets_point_to_contents() {
    let items = [
        file("a", "one").pax("uid", b"5"),
        file(&"n".repeat(150), "two two"),
        file("c", "3"),
    ];
    let bytes = tar(&items);
    let index = read(&bytes).unwrap();
    assert_eq!(index.tar_bytes, bytes.len() as u64);
    for (entry, item) in index.entries.iter().zip(&items) {
        let EntryKind::File { offset, bytes: len } = entry.kind else {
            panic!("{entry:?}");
        };
        assert_eq!(bytes[offset as usize..][..len as usize], item.content);
    }
}

#[test]
fn ustar_prefix_is_part_of_the_name() {
    let mut bytes = tar(&[file("name", "")]);
    bytes[257..265].copy_from_slice(b"ustar\x0000");
    bytes[345..351].copy_from_slice(b"prefix");
    seal(&mut bytes);
    assert_eq!(&*read(&bytes).unwrap().entries[0].path, "prefix/name");
    // In the GNU format this field has other content.
    bytes[257..265].copy_from_slice(b"ustar  \0");
    seal(&mut bytes);
    assert_eq!(&*read(&bytes).unwrap().entries[0].path, "name");
}

#[test]
fn old_and_odd_archives_are_read_like_docker() {
    assert!(entries(&[]).is_empty());
    assert!(read(b"").unwrap().entries.is_empty());
    let cut = cut_tar(&[file("a", "x")]);
    assert_eq!(
        read(&cut).unwrap().entries.len(),
        1,
        "an archive without an end mark is read"
    );
    assert_eq!(
        read(&[&cut[..], &[0; 512]].concat()).unwrap().entries.len(),
        1
    );
    let trailing = [&tar(&[file("a", "x")])[..], b"anything"].concat();
    assert_eq!(read(&trailing).unwrap().tar_bytes, trailing.len() as u64);
    let old = entries(&[
        item(0, "d/"),
        item(0, "f").with(|i| i.content = vec![1]),
        item(b'7', "g"),
    ]);
    assert_eq!(old[0].kind, EntryKind::Directory);
    assert!(matches!(old[1].kind, EntryKind::File { bytes: 1, .. }));
    assert!(matches!(old[2].kind, EntryKind::File { bytes: 0, .. }));
    // A directory has no content, even if its header contains a size.
    let sized = entries(&[dir("d").with(|item| item.size = Some(5)), file("f", "x")]);
    assert_eq!(sized.len(), 2);
    let global = item(b'g', "pax").with(|item| item.content = record("comment", b"0123"));
    assert_eq!(entries(&[global, file("f", "x")]).len(), 1);
}

#[test]
fn long_size_comes_from_the_pax_header() {
    let large = (OCTAL_SIZE_MAX + 1).to_string();
    for (pax, own) in [("3", 3), ("3", 0), (&large, 7)] {
        let item = file("a", "xyz").pax("size", pax.as_bytes());
        let bytes = tar(&[item.with(|item| item.size = Some(own))]);
        let budget = Budget::new(u64::MAX);
        let mut reader = TarReader::new(std::io::BufReader::new(&bytes[..]), &budget);
        let entry = reader.next().unwrap().unwrap();
        let EntryKind::File { bytes, .. } = entry.kind else {
            panic!("{entry:?}");
        };
        assert_eq!(bytes.to_string(), pax);
    }
}

#[test]
fn contradicting_headers_are_refused() {
    let two_paths = file(&"n".repeat(150), "").pax("path", b"other");
    refused(&tar(&[two_paths]), "contradict");
    let two_links = symlink("a", &"n".repeat(150)).pax("linkpath", b"other");
    refused(&tar(&[two_links]), "contradict");
    let two_sizes = file("a", "xyz").pax("size", b"4");
    refused(&tar(&[two_sizes]), "contradict");
    let same = file(&"n".repeat(150), "").pax("path", "n".repeat(150).as_bytes());
    assert_eq!(entries(&[same]).len(), 1);
    let extension = |kind, content: &[u8]| {
        let content = content.to_vec();
        item(kind, "x").with(|item| item.content = content)
    };
    for kind in [b'x', b'L', b'K'] {
        let record = if kind == b'x' {
            record("uid", b"1")
        } else {
            b"a\0".to_vec()
        };
        let twice = [
            extension(kind, &record),
            extension(kind, &record),
            file("f", ""),
        ];
        refused(&tar(&twice), "two extension headers");
    }
    let global = extension(b'g', &record("path", b"everything"));
    refused(&tar(&[global, file("f", "")]), "global");
}

#[test]
fn impossible_numbers_and_names_are_refused() {
    for (item, message) in [
        (file("../a", ""), "has a .."),
        (hardlink("a", "../../etc/shadow"), "has a .."),
        (symlink("a", ""), "no valid target"),
        (
            symlink("a", &"t".repeat(PATH_BYTES_MAX + 1)),
            "no valid target",
        ),
        (file(&"n".repeat(256), ""), "more than 255"),
        (file("a", "").owner(-1, 0), "owner"),
        (file("a", "").owner(0, i64::from(u32::MAX)), "owner"),
        (file("a", "").with(|i| i.size = Some(1 << 62)), "bytes"),
        (
            file("a", "").with(|i| i.size = Some(u64::MAX)),
            "impossible size",
        ),
        (file("a", "").with(|i| i.size = Some(1 << 31)), "more than"),
        (device(b'3', "a", 5000, 0), "device"),
        (item(b'S', "a"), "sparse"),
        (file("a", "").pax("GNU.sparse.size", b"1"), "sparse"),
        (item(b'V', "a"), "unknown kind 'V'"),
        (
            item(b'x', "a").with(|i| i.size = Some(EXTENSION_BYTES_MAX + 1)),
            "extension header",
        ),
        (
            item(b'L', "a").with(|i| i.size = Some(EXTENSION_BYTES_MAX + 1)),
            "extension header",
        ),
        (
            file("a", "").with(|i| i.path = b"a\xff".to_vec()),
            "not UTF-8",
        ),
        (
            symlink("a", "").with(|i| i.link = b"a\xff".to_vec()),
            "not UTF-8",
        ),
    ] {
        refused(&tar(&[item]), message);
    }
}

#[test]
fn damaged_archives_are_refused() {
    let good = tar(&[file("a", "some content"), file("b", "")]);
    for at in [1, 511, 513, 1023, 1025, 1535] {
        refused(&good[..at], "ends in the middle");
    }
    let mut wrong = good.clone();
    wrong[3] ^= 1;
    refused(&wrong, "damaged");
    refused(
        b"<html>this is not a tar at all</html>"
            .repeat(20)
            .as_slice(),
        "damaged",
    );
    let hole = [&good[..1536], &[0; 512], &good[..1024]].concat();
    refused(&hole, "one block of zeros");
}

/// An archive that repeats one entry without content forever.
struct Endless {
    block: Vec<u8>,
    at: usize,
}

impl std::io::Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = buffer.len().min(self.block.len() - self.at);
        buffer[..n].copy_from_slice(&self.block[self.at..self.at + n]);
        self.at = (self.at + n) % self.block.len();
        Ok(n)
    }
}

#[test]
fn endless_archives_reach_a_limit() {
    let endless = |item: Item| Endless {
        block: cut_tar(&[item]),
        at: 0,
    };
    let entries = index(
        std::io::BufReader::new(endless(file("a", ""))),
        &Budget::small(1000, 1 << 20),
    )
    .unwrap_err();
    assert!(
        entries.to_string().contains("more than 1000 entries"),
        "{entries}"
    );
    let long = format!("{}x", "d/".repeat(1000));
    let names = index(
        std::io::BufReader::new(endless(symlink(&long, &long))),
        &Budget::small(1000, 1 << 20),
    )
    .unwrap_err();
    assert!(
        names.to_string().contains("more than 1048576 bytes"),
        "{names}"
    );
}
