use super::super::test_image::{Compression, TestImage};
use super::super::test_tar::{Item, dir, file, gzip, hardlink, item, symlink, tar};
use super::super::test_tree::run;
use super::*;
use crate::locks::CancelCause;

/// Spools an archive and finds an image in it.
fn found(archive: &[u8], wanted: &Wanted) -> Result<Image> {
    let spool = tempfile::tempfile().unwrap();
    let cancel = Cancel::try_new().unwrap();
    let mut archive = Archive::spool(archive, spool, 1 << 30, &|_| {}, &cancel)?;
    let image = archive.image(wanted, &|_| {}, &cancel)?;
    for layer in &image.layers {
        let mut hashing = Hashing::new(archive.open(&layer.blob)?);
        std::io::copy(&mut hashing, &mut std::io::sink()).unwrap();
        assert_eq!(hashing.count(), layer.blob.size);
        assert_eq!(hashing.digest(), layer.blob.digest);
    }
    Ok(image)
}

fn wanted(format: Option<ArchiveFormat>, name: Option<&str>) -> Wanted {
    Wanted {
        format,
        name: name.map(str::to_owned),
        platform: Platform::default(),
    }
}

#[track_caller]
fn refused(items: &[Item], wanted: &Wanted, kind: Kind, message: &str) {
    let error = found(&tar(items), wanted).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(message), "{error}");
}

fn sample(compression: Compression) -> TestImage {
    let layers = [
        vec![dir("d"), file("d/a", "1")],
        vec![file("b", "2")],
        vec![],
        vec![],
    ];
    TestImage::new(&layers, compression)
}

#[test]
fn both_kinds_of_archives_are_recognised() {
    let image = sample(Compression::None);
    for (items, kind, name) in [
        (image.oci_archive("tag"), ArchiveFormat::Oci, "tag"),
        (
            image.docker_archive("app:1"),
            ArchiveFormat::Docker,
            "docker.io/library/app:1",
        ),
    ] {
        for kind in [None, Some(kind)] {
            for name in [None, Some(name)] {
                let wanted = wanted(kind, name);
                let plain = tar(&items);
                for bytes in [&plain, &gzip(&plain)] {
                    let found = found(bytes, &wanted).unwrap();
                    assert_eq!(
                        found.layers,
                        image
                            .resolve()
                            .layers
                            .iter()
                            .map(|layer| {
                                let media_type = found.layers[0].blob.media_type.clone();
                                let mut layer = layer.clone();
                                layer.blob.media_type = media_type;
                                layer
                            })
                            .collect::<Vec<_>>()
                    );
                    assert_eq!(found.config.cmd, ["/a"]);
                }
            }
        }
    }
}

#[test]
fn archive_with_both_manifests_is_of_the_kind_that_is_wanted() {
    let image = sample(Compression::None);
    let both = [image.oci_archive("tag"), image.docker_archive("app:1")].concat();
    let digest = |kind| found(&tar(&both), &wanted(kind, None)).unwrap().digest;
    assert_eq!(digest(None), image.resolve().digest);
    assert_eq!(digest(Some(ArchiveFormat::Oci)), image.resolve().digest);
    assert_ne!(digest(Some(ArchiveFormat::Docker)), image.resolve().digest);
}

/// Returns an archive as `docker save` writes it since version 25, with one entry for each tag.
fn saved(images: &[(&TestImage, &str)]) -> Vec<Item> {
    let mut items = Vec::new();
    let mut entries = Vec::new();
    for (image, name) in images {
        let tag = name.rsplit(':').next().unwrap();
        for item in image.oci_archive(tag) {
            match item.path.ends_with(b"index.json") {
                true => {
                    let index: serde_json::Value = serde_json::from_slice(&item.content).unwrap();
                    let mut entry = index["manifests"][0].clone();
                    entry["annotations"]["io.containerd.image.name"] = (*name).into();
                    entries.push(entry);
                }
                false => items.push(item),
            }
        }
    }
    let index = serde_json::json!({"schemaVersion": 2, "manifests": entries}).to_string();
    items.push(file("index.json", &index));
    items
}

#[test]
fn image_with_two_tags_is_one_image() {
    let image = sample(Compression::None);
    let names = ["docker.io/library/app:1", "docker.io/library/app:2"];
    let items = saved(&[(&image, names[0]), (&image, names[1])]);
    for (name, expected) in [
        (None, "app:1"),
        (Some("2"), "app:2"),
        (Some("app:2"), "app:2"),
        (Some("library/app:2"), "app:2"),
        (Some(names[1]), "app:2"),
    ] {
        let found = found(&tar(&items), &wanted(None, name)).unwrap();
        assert_eq!(found.digest, image.resolve().digest);
        assert_eq!(found.name.as_deref(), Some(expected), "{name:?}");
    }
}

#[test]
fn images_to_choose_from_are_named() {
    let other = TestImage::new(&[vec![file("other", "")]], Compression::None);
    let image = sample(Compression::None);
    let items = saved(&[
        (&image, "docker.io/library/app:latest"),
        (&other, "docker.io/library/other:latest"),
    ]);
    let any = Wanted::default();
    refused(&items, &any, Kind::InvalidArgument, "2 images");
    refused(
        &items,
        &any,
        Kind::InvalidArgument,
        "\"app:latest\", \"other:latest\"",
    );
    // A tag that both images have is ambiguous, and a name without a tag has the tag `latest`.
    refused(
        &items,
        &wanted(None, Some("latest")),
        Kind::InvalidArgument,
        "2 images",
    );
    let chosen = found(&tar(&items), &wanted(None, Some("other"))).unwrap();
    assert_eq!(chosen.digest, other.resolve().digest);
}

#[test]
fn docker_archive_gives_the_image_the_name_that_was_asked_for() {
    let image = sample(Compression::None);
    let mut items = image.docker_archive("app:1");
    let manifest = items.last_mut().unwrap();
    let text = String::from_utf8(manifest.content.clone()).unwrap();
    manifest.content = text.replace(r#"["app:1"]"#, r#"["app:1","app:2"]"#).into();
    let chosen = found(&tar(&items), &wanted(None, Some("app:2"))).unwrap();
    assert_eq!(chosen.name.as_deref(), Some("app:2"));
}

#[test]
fn image_that_is_not_in_the_archive_is_not_found() {
    let image = sample(Compression::Gzip);
    let oci = image.oci_archive("tag");
    let docker = image.docker_archive("app:1");
    refused(
        &oci,
        &wanted(None, Some("other")),
        Kind::ImageNotFound,
        "\"other\"",
    );
    refused(
        &docker,
        &wanted(None, Some("app:2")),
        Kind::ImageNotFound,
        "\"app:2\"",
    );
    refused(
        &docker,
        &wanted(None, Some("A:")),
        Kind::InvalidArgument,
        "reference",
    );
    refused(
        &oci,
        &wanted(Some(ArchiveFormat::Docker), None),
        Kind::InvalidImage,
        "docker-archive",
    );
    refused(
        &docker,
        &wanted(Some(ArchiveFormat::Oci), None),
        Kind::InvalidImage,
        "oci-archive",
    );
    refused(
        &[file("etc/passwd", "")],
        &wanted(None, None),
        Kind::InvalidImage,
        "neither",
    );
    let other = Wanted {
        platform: "linux/arm64".parse().unwrap(),
        ..Wanted::default()
    };
    refused(&docker, &other, Kind::Unsupported, "not for linux/arm64");
}

#[test]
fn hostile_archives_are_refused() {
    let any = Wanted::default();
    let manifest = |json: &str| vec![file("manifest.json", json)];
    refused(&manifest("[]"), &any, Kind::InvalidImage, "no image");
    refused(&manifest("{"), &any, Kind::InvalidImage, "manifest.json");
    refused(
        &manifest(r#"[{"Config":"a"},{"Config":"b"}]"#),
        &any,
        Kind::InvalidArgument,
        "2 images",
    );
    refused(
        &manifest(r#"[{"Config":"../../etc/shadow"}]"#),
        &any,
        Kind::InvalidImage,
        "..",
    );
    refused(
        &manifest(r#"[{"Config":"none"}]"#),
        &any,
        Kind::InvalidImage,
        "does not have \"none\"",
    );
    let mut looping = manifest(r#"[{"Config":"a"}]"#);
    looping.extend([symlink("a", "b"), symlink("b", "a")]);
    refused(&looping, &any, Kind::InvalidImage, "does not have");
    let mut outside = manifest(r#"[{"Config":"a"}]"#);
    outside.push(symlink("a", "../../etc/shadow"));
    refused(&outside, &any, Kind::InvalidImage, "does not have");
    let mut large = manifest(r#"[{"Config":"a"}]"#);
    large.push(file("a", "").with(|i| i.content = vec![b' '; DOCUMENT_BYTES_MAX as usize + 1]));
    refused(&large, &any, Kind::InvalidImage, "more than");
    refused(
        &[file("../manifest.json", "")],
        &any,
        Kind::InvalidImage,
        "..",
    );
    let many: Vec<Item> = (0..=ARCHIVE_FILES_MAX)
        .map(|n| file(&n.to_string(), ""))
        .collect();
    refused(&many, &any, Kind::InvalidImage, "files");
    let linked = [
        hardlink("manifest.json", "m"),
        file("m", "[]"),
        item(b'6', "fifo"),
    ];
    refused(&linked, &any, Kind::InvalidImage, "neither");
}

#[test]
fn changed_blob_of_archive_is_refused() {
    let image = sample(Compression::Gzip);
    let mut items = image.oci_archive("tag");
    let name = image.resolve().digest.hex();
    for item in &mut items {
        if item.path.ends_with(name.as_bytes()) {
            item.content[0] ^= 1;
        }
    }
    refused(
        &items,
        &Wanted::default(),
        Kind::InvalidImage,
        "another digest",
    );
}

#[test]
fn spooling_is_limited_and_can_be_cancelled() {
    let cancel = Cancel::try_new().unwrap();
    let large = tar(&[file("a", "").with(|item| item.content = vec![0; 2 << 20])]);
    let spool = |bytes: &[u8], max, progress: &dyn Fn(u64)| {
        Archive::spool(bytes, tempfile::tempfile().unwrap(), max, progress, &cancel).map(drop)
    };
    for bytes in [&large, &gzip(&large)] {
        let error = spool(bytes, 1 << 20, &|_| {}).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidImage, "{error}");
    }
    assert!(spool(&large[..large.len() / 2], 1 << 30, &|_| {}).is_err());
    let error = spool(&large, 1 << 30, &|_| cancel.cancel(CancelCause::Requested)).unwrap_err();
    assert_eq!(error.kind(), Kind::Cancelled, "{error}");
}

#[test]
fn computing_digests_of_docker_archive_is_reported_and_can_be_cancelled() {
    let image = sample(Compression::None);
    let cancel = Cancel::try_new().unwrap();
    let spool = tempfile::tempfile().unwrap();
    let bytes = tar(&image.docker_archive("app:1"));
    let mut archive = Archive::spool(&bytes[..], spool, 1 << 30, &|_| {}, &cancel).unwrap();
    let reported = std::cell::Cell::new(0);
    let progress = |bytes| reported.set(reported.get() + bytes);
    archive
        .image(&Wanted::default(), &progress, &cancel)
        .unwrap();
    let layers: usize = image.tars.iter().map(Vec::len).sum();
    assert_eq!(reported.get(), layers as u64);
    cancel.cancel(CancelCause::Requested);
    let error = archive.image(&Wanted::default(), &progress, &cancel);
    assert_eq!(error.unwrap_err().kind(), Kind::Cancelled);
}

#[test]
fn archives_of_skopeo_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let image = sample(Compression::Gzip);
    image.write_layout(&dir.path().join("layout"), "tag");
    let from = format!("oci:{}:tag", dir.path().join("layout").display());
    for (prefix, suffix) in [("oci-archive", "tag"), ("docker-archive", "app:1")] {
        let path = dir.path().join(format!("{prefix}.tar"));
        let to = format!("{prefix}:{}:{suffix}", path.display());
        run("skopeo", &["copy", "-q", "--insecure-policy", &from, &to]);
        let archive = std::fs::read(&path).unwrap();
        for name in [None, Some(suffix)] {
            let found = found(&archive, &wanted(None, name)).unwrap();
            let diff_ids = |image: &Image| -> Vec<Digest> {
                image.layers.iter().map(|layer| layer.diff_id).collect()
            };
            assert_eq!(diff_ids(&found), diff_ids(&image.resolve()));
        }
    }
}
