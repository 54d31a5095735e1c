//! Fuzz targets for what an image's author or its registry writes, for `tests/fuzz`.

use super::errors::bad;
use super::limits::{INDEX_DEPTH_MAX, LAYERS_MAX};
use super::manifest::{Descriptor, find_in_layout, resolve_with};
use super::{Digest, Location, Platform, Reference};

/// Parses a line as a location. What was parsed must mean the same when it is parsed again.
pub fn reference(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let Ok(Location::Registry(reference)) = text.parse() else {
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
