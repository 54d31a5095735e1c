//! Tests of exported archives.

use super::super::oci::{Archive, Wanted};
use super::super::registry::Boots;
use super::*;
use crate::api::image::{ImageConfig, ImageHistory};
use crate::locks::Cancel;
use std::path::Path;

fn info(name: &str) -> ImageInfo {
    ImageInfo {
        name: name.parse().unwrap(),
        dir: "/images/x".into(),
        boots: Boots::Runtime,
        rootfs: "/images/x/rootfs.ext4".into(),
        in_place: None,
        temporary: false,
        kernel: None,
        disk_bytes: 1 << 20,
        allocated_bytes: 0,
        os: "unknown".into(),
        kernel_version: String::new(),
        built_at: 1,
        guest_version: 4,
        owner_uid: None,
        digest: None,
        source: Some("gcc:13".into()),
        private: true,
        config: ImageConfig {
            env: vec!["A=b".into()],
            cmd: vec!["sh".into()],
            ..ImageConfig::default()
        },
        content: String::new(),
        recipe: None,
    }
}

/// Caches two layers. Returns the diff IDs of an image that uses the second layer twice.
fn cached(cache: &Layers) -> Vec<String> {
    let contents = [vec![1; 3000], vec![2; 512]];
    let ids = contents.map(|content| {
        let mut file = cache.new_file().unwrap();
        file.write_all(&content).unwrap();
        let id = Digest::of(&content).to_string();
        assert!(cache.insert(&id, &file, &|| false).unwrap());
        id
    });
    vec![ids[0].clone(), ids[1].clone(), ids[1].clone()]
}

fn step(empty_layer: bool) -> ImageHistory {
    ImageHistory {
        created_by: Some("COPY all".into()),
        empty_layer,
        ..ImageHistory::default()
    }
}

fn write(dir: &Path, name: &str, history: Vec<ImageHistory>) -> Vec<u8> {
    let cache = Layers::open(dir, u64::MAX).unwrap();
    let layers = cached(&cache);
    let details = ImageDetails { layers, history };
    let archive = OciArchive::of_layers(&info(name), &details, &cache).unwrap();
    let archive = archive.unwrap();
    let mut bytes = Vec::new();
    archive.write(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, archive.bytes());
    bytes
}

#[test]
fn archive_is_read_back_in_both_formats() {
    use crate::api::image::ArchiveFormat;
    let dir = tempfile::tempdir().unwrap();
    let bytes = write(dir.path(), "team/app:1", vec![step(false); 3]);
    for format in [ArchiveFormat::Oci, ArchiveFormat::Docker] {
        let cancel = Cancel::try_new().unwrap();
        let spool = tempfile::tempfile().unwrap();
        let mut archive = Archive::spool(&bytes[..], spool, 1 << 20, &|_| {}, &cancel).unwrap();
        let wanted = Wanted {
            format: Some(format),
            name: None,
            platform: Platform::default(),
        };
        let image = archive.image(&wanted, &|_| {}, &cancel).unwrap();
        assert_eq!(image.layers.len(), 3);
        assert!(image.name.unwrap().ends_with("team/app:1"));
    }
}

#[test]
fn history_that_does_not_match_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let fits = vec![step(false), step(true), step(false), step(false)];
    assert!(text(write(dir.path(), "app", fits)).contains("COPY all"));
    assert!(!text(write(dir.path(), "app", vec![step(false)])).contains("COPY all"));
}

#[test]
fn layers_that_are_not_all_cached_are_not_exported() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Layers::open(dir.path(), u64::MAX).unwrap();
    let mut layers = cached(&cache);
    layers.push(format!("sha256:{}", "0".repeat(64)));
    for layers in [vec![], layers] {
        let details = ImageDetails {
            layers,
            history: vec![],
        };
        let archive = OciArchive::of_layers(&info("app"), &details, &cache);
        assert!(archive.unwrap().is_none());
    }
}

/// Makes an archive of the file system in `disk`, in a helper process.
fn of_disk(disk: &File, cancel: &Cancel) -> Result<OciArchive> {
    let dir = tempfile::tempdir().unwrap();
    let cache = Layers::open(dir.path(), u64::MAX).unwrap();
    let spec = DiskSpec {
        info: &info("app"),
        disk,
        cache: &cache,
        helper: None,
        bytes_max: 1 << 20,
    };
    OciArchive::of_disk(&spec, cancel, &mut |_| {})
}

#[test]
fn file_system_becomes_one_layer() {
    let (_dir, disk) = super::super::ext4::tests::small();
    let cancel = Cancel::try_new().unwrap();
    let archive = of_disk(&disk, &cancel).unwrap();
    let mut bytes = Vec::new();
    archive.write(&mut bytes).unwrap();
    let spool = tempfile::tempfile().unwrap();
    let mut read = Archive::spool(&bytes[..], spool, 8 << 20, &|_| {}, &cancel).unwrap();
    let wanted = Wanted {
        format: None,
        name: None,
        platform: Platform::default(),
    };
    let image = read.image(&wanted, &|_| {}, &cancel).unwrap();
    assert_eq!(image.layers.len(), 1);
    cancel.cancel(crate::locks::CancelCause::Requested);
    let e = of_disk(&disk, &cancel).err().unwrap();
    assert_eq!(e.kind(), crate::error::Kind::Cancelled);
    let empty = tempfile::tempfile().unwrap();
    let e = of_disk(&empty, &Cancel::try_new().unwrap()).err().unwrap();
    assert_eq!(e.kind(), crate::error::Kind::InvalidImage, "{e}");
}
