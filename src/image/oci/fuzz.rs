//! Fuzz targets for the input that an image's author or its registry controls, for `tests/fuzz`.

use super::budget::Budget;
use super::decompress::inflate;
use super::entry::{Attributes, Entry, EntryKind, clean_path};
use super::errors::bad;
use super::files::IndexedLayer;
use super::layer::{LayerIndex, index};
use super::limits::{INDEX_DEPTH_MAX, LAYERS_MAX};
use super::manifest::{Descriptor, find_in_layout, resolve_with};
use super::{Digest, Platform, Reference};
use crate::locks::Cancel;
use std::io::{BufReader, Write};

/// Parses a line as a location, and checks that its text is parsed to the same location again.
pub fn reference(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let Ok(reference) = text.parse::<Reference>() else {
        return;
    };
    for again in [reference.to_string(), reference.familiar()] {
        let parsed: Reference = again.parse().expect("our own form is valid");
        assert_eq!(parsed, reference);
    }
    assert!(!reference.domain().starts_with('-') && !reference.path().contains(".."));
}

/// Separates the documents in an input. JSON text never has a null byte.
const SEPARATOR: u8 = 0;

/// Resolves an image from documents that are separated by null bytes: indexes, a manifest and a
/// configuration. Digests are not verified, because no mutation would pass that check.
pub fn manifest(input: &[u8]) {
    let platform = Platform::default();
    let mut documents = input.split(|b| *b == SEPARATOR);
    let root = Descriptor {
        media_type: String::new(),
        digest: Digest::of(b""),
        size: input.len() as u64,
    };
    let mut count = 0;
    let image = resolve_with(&root, &platform, |_, _| {
        count += 1;
        let document = documents.next().map(<[u8]>::to_vec);
        document.ok_or_else(|| bad("there are no more documents"))
    });
    assert!(count <= INDEX_DEPTH_MAX + 2);
    if let Ok(image) = image {
        assert!(image.layers.len() <= LAYERS_MAX);
    }
    for name in [None, Some("latest")] {
        let _ = find_in_layout(input, name, &platform);
    }
}

/// Gives every block that could be a header the right checksum, because a mutation of a header
/// would otherwise be refused before it is read.
fn seal_headers(tar: &mut [u8]) {
    for block in tar.chunks_exact_mut(512) {
        if block[257..].starts_with(b"ustar") {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

/// Limit of the memory for an inflated layer in [`layer`].
const INFLATED_BYTES_MAX: u64 = 1 << 20;

/// Inflates and indexes a layer, and checks that every indexed entry is safe.
pub fn layer(input: &[u8]) {
    let Ok(mut tar) = inflate(input, INFLATED_BYTES_MAX) else {
        return;
    };
    seal_headers(&mut tar);
    let Ok(index) = index(BufReader::new(&tar[..]), &Budget::new(INFLATED_BYTES_MAX)) else {
        return;
    };
    assert!(index.tar_bytes <= tar.len() as u64);
    for entry in &index.entries {
        let mut parts = entry.path.split('/');
        assert!(entry.path.is_empty() || !parts.any(|part| matches!(part, "" | "." | "..")));
        if let EntryKind::File { offset, bytes } = entry.kind {
            assert!(offset + bytes <= index.tar_bytes);
        }
    }
    // A cached layer is indexed by seeking, with the same result.
    let mut cached = memory_file();
    cached.write_all(&tar).expect("memory takes every write");
    let again = IndexedLayer::of_cached(cached, &Budget::new(INFLATED_BYTES_MAX));
    assert_eq!(again.expect("it was indexed before").index, index);
}

fn memory_file() -> std::fs::File {
    let file = rustix::fs::memfd_create("layer", rustix::fs::MemfdFlags::CLOEXEC);
    file.expect("a file in memory").into()
}

/// Parses one line of the input of [`merge`]: a letter for the kind, a path, and a target after a
/// tab.
fn entry_of(line: &str) -> Option<Entry> {
    let (kind, rest) = line.split_at_checked(1)?;
    let (path, target) = rest.split_once('\t').unwrap_or((rest, ""));
    let kind = match kind {
        "d" => EntryKind::Directory,
        "f" => EntryKind::File {
            offset: 0,
            bytes: target.len() as u64,
        },
        "l" if !target.is_empty() => EntryKind::Symlink {
            target: target.into(),
        },
        "h" => EntryKind::HardLink {
            target: clean_path(target.as_bytes()).ok()?,
        },
        "p" => EntryKind::Fifo,
        _ => return None,
    };
    Some(Entry {
        path: clean_path(path.as_bytes()).ok()?,
        kind,
        attributes: Attributes::default(),
    })
}

/// Merges layers that are written as lines; a line with a dash begins the next layer. Mutations of
/// a tar would not reach as much code.
pub fn merge(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let mut layers = vec![LayerIndex::default()];
    for line in text.lines() {
        if line == "-" {
            layers.push(LayerIndex::default());
        } else if let Some(last) = layers.last_mut() {
            last.entries.extend(entry_of(line));
        }
    }
    let layers: Vec<&LayerIndex> = layers.iter().collect();
    let cancel = Cancel::try_new().expect("an eventfd");
    if let Ok(tree) = super::merge::merge(&layers, &cancel) {
        tree.check();
        super::flatten::declare_only(&tree, &cancel).ok();
    }
}
