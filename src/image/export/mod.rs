//! Writes an image as an OCI archive, which `docker load`, skopeo and podman read.
//!
//! An image that was pulled has layers. If all of them are still cached, the archive contains them
//! unchanged. Otherwise a helper process reads the image's file system ([`layer`]) and makes one
//! layer from it. In either case, the daemon only copies layers and does not parse them. The
//! documents around them are made here. The manifest differs from that of the registry, because the
//! layers are not compressed.

pub(crate) mod helper;
mod layer;
mod messages;
#[cfg(test)]
mod tests;

use super::ImageInfo;
use super::oci::{Digest, Platform};
use super::pull::{Layers, digest_of};
use super::registry::ImageDetails;
use crate::error::{Error, Result};
use crate::host::Credentials;
use crate::host::wait::cancelled_by;
use crate::locks::Cancel;
use layer::LayerSpec;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};

const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
/// A tar archive consists of records of this size, and ends with two that are zero.
const RECORD_BYTES: u64 = 512;

/// An archive to write.
pub(crate) struct OciArchive {
    /// The documents by their path.
    documents: Vec<(String, Vec<u8>)>,
    layers: BTreeMap<String, Layer>,
}

struct Layer {
    file: File,
    bytes: u64,
}

/// An image whose file system becomes a layer.
pub(crate) struct DiskSpec<'a> {
    pub info: &'a ImageInfo,
    /// Its file system.
    pub disk: &'a File,
    /// The cache in which the layer's file is created.
    pub cache: &'a Layers,
    /// The uid and gid of the helper, if the daemon is root.
    pub helper: Option<Credentials>,
    /// The size limit of the layer.
    pub bytes_max: u64,
}

impl OciArchive {
    /// Makes an archive of an image's own layers. Returns None if the image has no layers, or if
    /// one of them is no longer cached.
    pub(crate) fn of_layers(
        info: &ImageInfo,
        details: &ImageDetails,
        cache: &Layers,
    ) -> Result<Option<Self>> {
        let mut files = Vec::new();
        for diff_id in &details.layers {
            let Some(file) = cache.get(diff_id)? else {
                return Ok(None);
            };
            files.push(file);
        }
        if files.is_empty() {
            return Ok(None);
        }
        Self::of(info, details, files).map(Some)
    }

    /// Makes an archive with one layer, which contains all files of the file system. `progress`
    /// receives the bytes done.
    ///
    /// # Errors
    /// `invalid_image` if the file system is damaged, `unsupported` if it has features that this
    /// version cannot read or names that a layer cannot have, `cancelled`, `disk_full`.
    pub(crate) fn of_disk(
        spec: &DiskSpec<'_>,
        cancel: &Cancel,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        let file = spec.cache.new_file()?;
        let made = LayerSpec {
            disk: spec.disk,
            layer: &file,
            bytes_max: spec.bytes_max,
            helper: spec.helper,
        };
        // The helper has ended when this returns, so it cannot change the layer any more.
        layer::make(&made, cancel, progress)?;
        let digest = digest_of(&file, &|| cancel.is_cancelled())
            .map_err(|e| Error::io("hash the layer", e))?;
        let details = ImageDetails {
            layers: vec![digest.ok_or_else(|| cancelled_by(cancel))?],
            history: Vec::new(),
        };
        Self::of(spec.info, &details, vec![file])
    }

    fn of(info: &ImageInfo, details: &ImageDetails, files: Vec<File>) -> Result<Self> {
        let mut layers = BTreeMap::new();
        let mut described = Vec::new();
        for (diff_id, file) in details.layers.iter().zip(files) {
            let digest: Digest = diff_id.parse()?;
            let io = |e| Error::io(format!("read the size of layer {diff_id}"), e);
            let bytes = file.metadata().map_err(io)?.len();
            described.push(json!({"mediaType": LAYER_TYPE, "digest": diff_id, "size": bytes}));
            layers.insert(digest.hex(), Layer { file, bytes });
        }
        let documents = documents(info, details, &described);
        Ok(Self { documents, layers })
    }

    /// Returns the size of the archive in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        let documents = self.documents.iter().map(|(_, bytes)| bytes.len() as u64);
        let layers = self.layers.values().map(|layer| layer.bytes);
        let entries = documents.chain(layers);
        let records = entries.map(|bytes| RECORD_BYTES + bytes.next_multiple_of(RECORD_BYTES));
        records.sum::<u64>() + 2 * RECORD_BYTES
    }

    pub(crate) fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut tar = tar::Builder::new(to);
        for (path, bytes) in &self.documents {
            append(&mut tar, path, bytes.len() as u64, &bytes[..])?;
        }
        for (hex, layer) in &self.layers {
            let content = At(&layer.file, 0).take(layer.bytes);
            append(&mut tar, &blob_path(hex), layer.bytes, content)?;
        }
        tar.into_inner()?.flush()
    }
}

/// Reads a file from its beginning with positioned reads, because others may share the file's own
/// position.
struct At<'a>(&'a File, u64);

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = std::os::unix::fs::FileExt::read_at(self.0, buffer, self.1)?;
        self.1 += read as u64;
        Ok(read)
    }
}

fn append(
    tar: &mut tar::Builder<&mut dyn Write>,
    path: &str,
    bytes: u64,
    content: impl Read,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes);
    header.set_mode(0o644);
    tar.append_data(&mut header, path, content)
}

fn blob_path(hex: &str) -> String {
    format!("blobs/sha256/{hex}")
}

/// Returns the documents of the archive, in the order in which readers need them.
fn documents(info: &ImageInfo, details: &ImageDetails, layers: &[Value]) -> Vec<(String, Vec<u8>)> {
    let to_bytes = |value: &Value| value.to_string().into_bytes();
    let blob = |bytes: &[u8], media_type: &str| {
        let digest = Digest::of(bytes);
        let described = json!({
            "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len(),
        });
        (blob_path(&digest.hex()), described)
    };
    let config = to_bytes(&configuration(info, details));
    let (config_path, config_described) = blob(&config, CONFIG_TYPE);
    let manifest = to_bytes(&json!({
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
        "config": config_described, "layers": layers,
    }));
    let (manifest_path, mut manifest_described) = blob(&manifest, MANIFEST_TYPE);
    // A name with a digest would claim that the manifest is the registry's.
    let name = info.name.with_default_tag().to_string();
    let name = (!name.contains('@')).then_some(name);
    if let Some(name) = &name {
        manifest_described["annotations"] = json!({
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name,
        });
    }
    let index = json!({
        "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [manifest_described],
    });
    let paths = details.layers.iter().map(|diff_id| {
        let hex = diff_id.split_once(':').map_or("", |(_, hex)| hex);
        blob_path(hex)
    });
    // docker load reads this document.
    let docker = json!([{
        "Config": config_path,
        "RepoTags": name.into_iter().collect::<Vec<_>>(),
        "Layers": paths.collect::<Vec<_>>(),
    }]);
    let layout = br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec();
    vec![
        ("oci-layout".to_owned(), layout),
        ("index.json".to_owned(), to_bytes(&index)),
        ("manifest.json".to_owned(), to_bytes(&docker)),
        (manifest_path, manifest),
        (config_path, config),
    ]
}

/// Returns the image's configuration (config.md of the OCI image specification), without members
/// that have no value.
fn configuration(info: &ImageInfo, details: &ImageDetails) -> Value {
    let config = &info.config;
    let members = [
        ("User", json!(config.user)),
        ("Env", json!(config.env)),
        ("WorkingDir", json!(config.working_dir)),
        ("Entrypoint", json!(config.entrypoint)),
        ("Cmd", json!(config.cmd)),
        ("StopSignal", json!(config.stop_signal)),
    ];
    let has_value = |value: &Value| match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => true,
    };
    let execution: serde_json::Map<String, Value> = members
        .into_iter()
        .filter(|(_, value)| has_value(value))
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    let platform = Platform::default();
    let mut document = json!({
        "architecture": platform.architecture, "os": platform.os,
        "config": execution,
        "rootfs": { "type": "layers", "diff_ids": details.layers },
    });
    // Readers refuse a history that does not match the layers.
    let steps = details.history.iter().filter(|step| !step.empty_layer);
    if steps.count() == details.layers.len() {
        document["history"] = json!(details.history);
    }
    document
}
