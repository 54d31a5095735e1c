use super::*;
use serde_json::{Value, json};
use std::collections::HashMap;

/// Blobs in memory.
#[derive(Default)]
struct Memory(HashMap<Digest, Vec<u8>>);

impl Memory {
    fn add(&mut self, media_type: &str, document: &Value) -> Value {
        let bytes = serde_json::to_vec(document).unwrap();
        let (digest, size) = (Digest::of(&bytes), bytes.len());
        self.0.insert(digest, bytes);
        json!({"mediaType": media_type, "digest": digest, "size": size})
    }
}

impl Blobs for Memory {
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send + '_>> {
        match self.0.get(&blob.digest) {
            Some(bytes) => Ok(Box::new(bytes.as_slice())),
            None => Err(bad(format!("blob {} is missing", blob.digest))),
        }
    }
}

fn layer(n: usize) -> Value {
    let digest = Digest::of(&n.to_le_bytes());
    json!({"mediaType": format!("{}+gzip", LAYERS[0]), "digest": digest, "size": n, "urls": ["http://x"]})
}

fn diff_id(n: usize) -> Digest {
    Digest::of(&[n as u8, 1])
}

fn config(platform: &str, layers: usize) -> Value {
    let (os, architecture) = platform.split_once('/').unwrap();
    let diff_ids: Vec<Digest> = (0..layers).map(diff_id).collect();
    json!({
        "os": os, "architecture": architecture,
        "config": {
            "User": "app:app", "Env": ["PATH=/bin", "A=b c"], "WorkingDir": "/srv", "Entrypoint": null,
            "Cmd": ["/bin/app", "-x"], "StopSignal": "SIGINT", "Labels": {"a": "b"}, "Volumes": {"/v": {}},
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "COPY"}, {"empty_layer": true}],
    })
}

fn manifest(blobs: &mut Memory, platform: &str, layers: usize) -> Value {
    let config = blobs.add(OCI_CONFIG, &config(platform, layers));
    let layers: Vec<Value> = (0..layers).map(layer).collect();
    blobs.add(
        OCI_MANIFEST,
        &json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}),
    )
}

fn index(blobs: &mut Memory, entries: &[(&str, Value)]) -> Value {
    let entries: Vec<Value> = entries
        .iter()
        .map(|(platform, descriptor)| {
            let mut parts = platform.split('/');
            let mut descriptor = descriptor.clone();
            descriptor["platform"] = json!({
                "os": parts.next(), "architecture": parts.next(), "variant": parts.next(),
            });
            descriptor
        })
        .collect();
    blobs.add(
        OCI_INDEX,
        &json!({"schemaVersion": 2, "manifests": entries}),
    )
}

fn resolved(blobs: &Memory, root: &Value, platform: &str) -> Result<Image> {
    let root = serde_json::from_value(root.clone()).unwrap();
    resolve(&root, &platform.parse().unwrap(), blobs)
}

#[track_caller]
fn refused(blobs: &Memory, root: &Value, kind: Kind, message: &str) {
    let error = resolved(blobs, root, "linux/amd64").unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(message), "{error}");
}

#[test]
fn manifest_with_configuration_is_read() {
    let mut blobs = Memory::default();
    let root = manifest(&mut blobs, "linux/amd64", 2);
    let image = resolved(&blobs, &root, "linux/amd64").unwrap();
    assert_eq!(json!(image.digest), root["digest"]);
    assert_eq!(image.layers.len(), 2);
    assert_eq!(image.layers[1].diff_id, diff_id(1));
    assert_eq!(json!(image.layers[1].blob.digest), layer(1)["digest"]);
    let config = &image.config;
    assert_eq!(
        (config.user.as_str(), config.working_dir.as_str()),
        ("app:app", "/srv")
    );
    assert_eq!(config.env, ["PATH=/bin", "A=b c"]);
    assert!(config.entrypoint.is_empty());
    assert_eq!(config.cmd, ["/bin/app", "-x"]);
    assert_eq!(config.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(image.history.len(), 2);
    assert!(image.history[1].empty_layer);
}

#[test]
fn docker_documents_are_read() {
    let mut blobs = Memory::default();
    let config = blobs.add(DOCKER_CONFIG, &config("linux/amd64", 1));
    let mut layer = layer(0);
    layer["mediaType"] = json!("application/vnd.docker.image.rootfs.diff.tar.gzip");
    let manifest = json!({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": config, "layers": [layer]});
    let mut entry = blobs.add(DOCKER_MANIFEST, &manifest);
    entry["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let list = json!({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [entry]});
    let root = blobs.add(DOCKER_LIST, &list);
    assert_eq!(
        resolved(&blobs, &root, "linux/amd64").unwrap().layers.len(),
        1
    );
}

#[test]
fn index_is_followed_to_the_platform() {
    let mut blobs = Memory::default();
    let amd = manifest(&mut blobs, "linux/amd64", 1);
    let arm = manifest(&mut blobs, "linux/arm64", 2);
    let inner = index(&mut blobs, &[("linux/amd64", amd.clone())]);
    let root = index(
        &mut blobs,
        &[
            ("unknown/unknown", layer(1)),
            ("linux/arm64/v8", arm),
            ("linux/amd64", inner),
        ],
    );
    let image = resolved(&blobs, &root, "linux/amd64").unwrap();
    assert_eq!(json!(image.digest), amd["digest"]);
    assert_eq!(
        resolved(&blobs, &root, "linux/arm64").unwrap().layers.len(),
        2
    );
    let error = resolved(&blobs, &root, "linux/s390x").unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(
        error
            .hint_text()
            .unwrap()
            .contains("linux/arm64/v8, linux/amd64")
    );
}

#[test]
fn variant_of_platform_is_chosen() {
    // `expected` is the position of the entry that must be chosen.
    let check = |offered: &[&str], wanted: &str, expected: Option<usize>| {
        let mut blobs = Memory::default();
        // Images differ in their number of layers. Most configurations do not name a variant.
        let entries: Vec<(&str, Value)> = offered
            .iter()
            .enumerate()
            .map(|(at, platform)| {
                let plain: Vec<&str> = platform.split('/').take(2).collect();
                (*platform, manifest(&mut blobs, &plain.join("/"), at))
            })
            .collect();
        let root = index(&mut blobs, &entries);
        let chosen = resolved(&blobs, &root, wanted).ok();
        let chosen = chosen.map(|image| image.layers.len());
        assert_eq!(chosen, expected, "{wanted} of {offered:?}");
    };
    let [v1, v2, v3, plain] = [
        "linux/amd64/v1",
        "linux/amd64/v2",
        "linux/amd64/v3",
        "linux/amd64",
    ];
    check(&[v3, plain, v2], plain, Some(1));
    check(&[v3, v1, plain], plain, Some(1));
    check(&[v3, v2], plain, Some(1));
    check(&[v3, v2, plain], v2, Some(1));
    check(&[plain, v3], v2, Some(0));
    check(&[v3], v2, None);
    check(&["linux/amd64/odd", v3], plain, Some(1));
    check(&["linux/amd64/odd"], plain, Some(0));
    check(&["linux/arm64/v9", "linux/arm64"], "linux/arm64", Some(1));
    check(
        &["linux/arm64/v9", "linux/arm64"],
        "linux/arm64/v8",
        Some(1),
    );
    check(&["linux/arm/v7", "linux/arm/v6"], "linux/arm/v6", Some(1));
}

#[test]
fn chain_of_indexes_is_limited() {
    let mut blobs = Memory::default();
    let mut root = manifest(&mut blobs, "linux/amd64", 1);
    for _ in 0..INDEX_DEPTH_MAX {
        root = index(&mut blobs, &[("linux/amd64", root)]);
    }
    resolved(&blobs, &root, "linux/amd64").unwrap();
    root = index(&mut blobs, &[("linux/amd64", root)]);
    refused(&blobs, &root, Kind::InvalidImage, "refer to each other");
}

#[test]
fn lying_sizes_and_digests_are_refused() {
    let mut blobs = Memory::default();
    let root = manifest(&mut blobs, "linux/amd64", 1);
    let size = root["size"].as_u64().unwrap();
    for (wrong, message) in [
        (size - 1, "more than"),
        (size + 1, "fewer than"),
        (DOCUMENT_BYTES_MAX + 1, "are allowed"),
        (u64::MAX, "are allowed"),
    ] {
        let mut root = root.clone();
        root["size"] = json!(wrong);
        refused(&blobs, &root, Kind::InvalidImage, message);
    }
    let digest: Digest = serde_json::from_value(root["digest"].clone()).unwrap();
    blobs.0.get_mut(&digest).unwrap()[0] ^= 1;
    refused(&blobs, &root, Kind::InvalidImage, "another digest");
}

#[test]
fn wrong_documents_are_refused() {
    let mut blobs = Memory::default();
    let config_of =
        |blobs: &mut Memory, layers| blobs.add(OCI_CONFIG, &config("linux/amd64", layers));
    let good = config_of(&mut blobs, 0);
    let artifact = blobs.add("application/vnd.cncf.helm.config.v1+json", &json!({}));
    let many: Vec<Value> = (0..=LAYERS_MAX).map(layer).collect();
    let mut chart = layer(0);
    chart["mediaType"] = json!("application/vnd.cncf.helm.chart.content.v1.tar+gzip");
    let mut odd_digest = layer(0);
    odd_digest["digest"] = json!("sha256:../../etc/passwd");
    let mut huge = layer(0);
    huge["size"] = json!(u64::MAX);
    let entries: Vec<Value> = (0..=INDEX_ENTRIES_MAX).map(layer).collect();
    let invalid = Kind::InvalidImage;
    for (document, kind, message) in [
        (json!([]), invalid, "read the manifest"),
        (json!({}), invalid, "neither"),
        (
            json!({"schemaVersion": 1, "fsLayers": []}),
            Kind::Unsupported,
            "schema 1",
        ),
        (
            json!({"manifests": [], "config": good, "layers": []}),
            invalid,
            "neither",
        ),
        (
            json!({"mediaType": OCI_INDEX, "config": good, "layers": []}),
            invalid,
            "mediaType",
        ),
        (
            json!({"mediaType": OCI_MANIFEST, "manifests": []}),
            invalid,
            "mediaType",
        ),
        (json!({"manifests": []}), Kind::Unsupported, "linux/amd64"),
        (json!({"manifests": entries}), invalid, "entries"),
        (
            json!({"config": artifact, "layers": []}),
            Kind::Unsupported,
            "helm",
        ),
        (json!({"config": good, "layers": many}), invalid, "layers"),
        (
            json!({"config": good, "layers": [chart]}),
            Kind::Unsupported,
            "not a tar",
        ),
        (
            json!({"config": good, "layers": [huge, huge]}),
            invalid,
            "larger than any disk",
        ),
        (
            json!({"config": good, "layers": [odd_digest]}),
            invalid,
            "not a digest",
        ),
        (
            json!({"config": good, "layers": [layer(0)]}),
            invalid,
            "has 0",
        ),
    ] {
        let root = blobs.add(OCI_MANIFEST, &document);
        refused(&blobs, &root, kind, message);
    }
}

#[test]
fn wrong_configurations_are_refused() {
    for (key, value, kind, message) in [
        (
            "os",
            json!("windows"),
            Kind::Unsupported,
            "not for linux/amd64",
        ),
        (
            "rootfs",
            json!({"diff_ids": ["sha512:00"]}),
            Kind::InvalidImage,
            "digest",
        ),
        ("rootfs", json!(null), Kind::InvalidImage, "configuration"),
        (
            "history",
            json!(vec![json!({}); HISTORY_MAX + 1]),
            Kind::InvalidImage,
            "steps",
        ),
        (
            "config",
            json!({"User": "a\0b"}),
            Kind::InvalidImage,
            "null character",
        ),
        (
            "config",
            json!({"Env": vec!["A=b"; STRINGS_MAX + 1]}),
            Kind::InvalidImage,
            "strings",
        ),
        (
            "config",
            json!({"Cmd": ["x".repeat(STRING_BYTES_MAX + 1)]}),
            Kind::InvalidImage,
            "string",
        ),
        (
            "config",
            json!({"Env": vec!["\u{1}".repeat(1024); 64]}),
            Kind::InvalidImage,
            "bytes as JSON",
        ),
        (
            "config",
            json!({"Cmd": "a b"}),
            Kind::InvalidImage,
            "configuration",
        ),
    ] {
        let mut blobs = Memory::default();
        let mut document = config("linux/amd64", 0);
        document[key] = value;
        let config = blobs.add(OCI_CONFIG, &document);
        let root = blobs.add(OCI_MANIFEST, &json!({"config": config, "layers": []}));
        refused(&blobs, &root, kind, message);
    }
}

#[test]
fn layout_image_is_found_by_name_or_alone() {
    let platform = Platform::default();
    let find = |entries: &[Value], name| {
        let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": entries})).unwrap();
        find_in_layout(&index, name, &platform)
    };
    let named = |n: usize, key: &str, name: &str| {
        let mut entry = layer(n);
        entry["annotations"] = json!({key: name});
        entry
    };
    let (a, b) = (
        named(1, REF_NAME, "a"),
        named(2, CONTAINERD_NAME, "docker.io/library/b:1"),
    );
    assert_eq!(find(std::slice::from_ref(&a), None).unwrap().blob.size, 1);
    assert_eq!(
        find(&[a.clone(), b.clone()], Some("a")).unwrap().blob.size,
        1
    );
    assert_eq!(
        find(&[a.clone(), b.clone()], Some("docker.io/library/b:1"))
            .unwrap()
            .blob
            .size,
        2
    );
    let kind = |entries: &[Value], name| find(entries, name).unwrap_err().kind();
    assert_eq!(kind(&[a.clone(), b.clone()], None), Kind::InvalidArgument);
    assert_eq!(
        kind(std::slice::from_ref(&a), Some("c")),
        Kind::ImageNotFound
    );
    assert_eq!(kind(&[], None), Kind::InvalidImage);
    let for_platform = |n: usize, architecture: &str| {
        let mut entry = layer(n);
        entry["platform"] = json!({"os": "linux", "architecture": architecture});
        entry
    };
    let entries = [for_platform(1, "arm64"), for_platform(2, "amd64")];
    assert_eq!(find(&entries, None).unwrap().blob.size, 2);
}
