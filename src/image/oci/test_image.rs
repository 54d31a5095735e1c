//! Makes whole images for tests, in memory, as a layout and as archives.

use super::digest::Digest;
use super::errors::bad;
use super::manifest::{Blobs, Descriptor, Image, resolve};
use super::platform::Platform;
use super::test_tar::{Item, dir, file, gzip, tar, zstd};
use crate::error::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// An image with its blobs.
pub(super) struct TestImage {
    pub(super) blobs: BTreeMap<Digest, Vec<u8>>,
    pub(super) tars: Vec<Vec<u8>>,
    pub(super) layers: Vec<Descriptor>,
    config: Descriptor,
    root: Descriptor,
    /// How many layers were opened.
    pub(super) opened: AtomicUsize,
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
    }
}

fn as_json(descriptor: &Descriptor) -> Value {
    json!({
        "mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size,
    })
}

impl TestImage {
    pub(super) fn new(layers: &[Vec<Item>], compression: Compression) -> Self {
        let tars = layers.iter().map(|items| tar(items)).collect();
        Self::of_tars(tars, compression)
    }

    pub(super) fn of_tars(tars: Vec<Vec<u8>>, compression: Compression) -> Self {
        let mut blobs = BTreeMap::new();
        let mut add = |media_type: &str, bytes: Vec<u8>| {
            let added = descriptor(media_type, &bytes);
            blobs.insert(added.digest, bytes);
            added
        };
        let diff_ids: Vec<Digest> = tars.iter().map(|tar| Digest::of(tar)).collect();
        let suffix = match compression {
            Compression::None => "",
            Compression::Gzip => "+gzip",
            Compression::Zstd => "+zstd",
        };
        let compress = |tar: &[u8]| match compression {
            Compression::None => tar.to_vec(),
            Compression::Gzip => gzip(tar),
            Compression::Zstd => zstd(tar),
        };
        let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
        let layers: Vec<Descriptor> = tars
            .iter()
            .map(|tar| add(&media_type, compress(tar)))
            .collect();
        let config = json!({
            "os": "linux", "architecture": "amd64", "config": {"Cmd": ["/a"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = add(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().into_bytes(),
        );
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": as_json(&config), "layers": layers.iter().map(as_json).collect::<Vec<_>>(),
        });
        let root = add(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.to_string().into_bytes(),
        );
        Self {
            blobs,
            tars,
            layers,
            config,
            root,
            opened: AtomicUsize::new(0),
        }
    }

    pub(super) fn resolve(&self) -> Image {
        resolve(&self.root, &Platform::default(), self).unwrap()
    }

    fn index(&self, tag: &str) -> Vec<u8> {
        let mut entry = as_json(&self.root);
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        json!({"schemaVersion": 2, "manifests": [entry]})
            .to_string()
            .into_bytes()
    }

    /// Writes an OCI layout with the image as `tag`.
    pub(super) fn write_layout(&self, to: &Path, tag: &str) {
        let blobs = to.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(to.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        std::fs::write(to.join("index.json"), self.index(tag)).unwrap();
        for (digest, bytes) in &self.blobs {
            std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        }
    }

    /// Returns an oci-archive.
    pub(super) fn oci_archive(&self, tag: &str) -> Vec<Item> {
        let bytes = |path: &str, content: &[u8]| {
            let content = content.to_vec();
            file(path, "").with(|item| item.content = content)
        };
        let mut items = vec![dir("./"), dir("./blobs"), dir("./blobs/sha256")];
        items.push(bytes("./index.json", &self.index(tag)));
        items.push(bytes("./oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#));
        for (digest, blob) in &self.blobs {
            items.push(bytes(&format!("./blobs/sha256/{}", digest.hex()), blob));
        }
        items
    }

    /// Returns a docker-archive as old versions of docker write it. A layer that occurs twice is a
    /// link.
    pub(super) fn docker_archive(&self, tag: &str) -> Vec<Item> {
        let bytes =
            |path: &str, content: Vec<u8>| file(path, "").with(|item| item.content = content);
        let mut items = Vec::new();
        let mut paths: Vec<String> = Vec::new();
        for (at, tar) in self.tars.iter().enumerate() {
            let path = format!("layer{at}/layer.tar");
            items.push(
                match self.tars[..at].iter().position(|other| other == tar) {
                    Some(other) => {
                        super::test_tar::symlink(&path, &format!("../layer{other}/layer.tar"))
                    }
                    None => bytes(&path, tar.clone()),
                },
            );
            paths.push(path);
        }
        let config = format!("{}.json", self.config.digest.hex());
        items.push(bytes(&config, self.blobs[&self.config.digest].clone()));
        let manifest = json!([{"Config": config, "RepoTags": [tag], "Layers": paths}]);
        items.push(bytes("manifest.json", manifest.to_string().into_bytes()));
        items
    }
}

impl Blobs for TestImage {
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send + '_>> {
        let is_layer = self.layers.iter().any(|layer| layer.digest == blob.digest);
        self.opened
            .fetch_add(usize::from(is_layer), Ordering::Relaxed);
        match self.blobs.get(&blob.digest) {
            Some(bytes) => Ok(Box::new(bytes.as_slice())),
            None => Err(bad(format!("blob {} is missing", blob.digest))),
        }
    }
}
