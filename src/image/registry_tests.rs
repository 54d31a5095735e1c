//! Tests of the registry of images.

use super::super::directory::DELETING_PREFIX;
use super::*;
use std::os::unix::fs::PermissionsExt;

fn name() -> ImageRef {
    "default".parse().unwrap()
}

fn publish(images: &Images) -> Result<ImageInfo> {
    publish_as(images, false)
}

fn publish_as(images: &Images, private: bool) -> Result<ImageInfo> {
    let staging = images.stage(&name())?;
    let files = staging.path().join("out");
    std::fs::create_dir(&files).unwrap();
    let mut metadata = Metadata {
        private,
        ..Metadata::new(&name(), &[], 7)
    };
    for (file, bytes) in [(KERNEL, 3), (INITRD, 2), (ROOTFS, 8192)] {
        std::fs::write(files.join(file), vec![1; bytes]).unwrap();
        metadata.files.push(FileRecord {
            name: file.into(),
            bytes: bytes as u64,
            sha256: String::new(),
        });
    }
    images.publish(&files, &metadata)
}

#[test]
fn published_image_is_complete_and_not_replaced() {
    let state = tempfile::tempdir().unwrap();
    let images = Images::open(state.path()).unwrap();
    assert_eq!(images.get(&name()).unwrap_err().kind(), Kind::ImageNotFound);
    let info = publish(&images).unwrap();
    assert_eq!((info.disk_bytes, info.built_at), (8192, 7));
    assert_eq!(
        std::fs::metadata(&info.rootfs)
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o444
    );
    assert_eq!(publish(&images).unwrap_err().kind(), Kind::NameTaken);
    let again = Images::open(state.path()).unwrap();
    assert_eq!(again.list().unwrap(), [info]);
    assert_eq!(
        std::fs::read_dir(state.path().join("images"))
            .unwrap()
            .count(),
        1
    );
}

#[test]
fn other_users_cannot_read_private_images_or_list_the_registry() {
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for (private, expected) in [(false, 0o755), (true, 0o700)] {
        let state = tempfile::tempdir().unwrap();
        let images = Images::open(state.path()).unwrap();
        let info = publish_as(&images, private).unwrap();
        assert_eq!(mode(&info.dir), expected);
        assert_eq!(mode(&state.path().join("images")), 0o711);
        // An image that an earlier version published.
        std::fs::set_permissions(&info.dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        Images::open(state.path()).unwrap();
        assert_eq!(mode(&info.dir), expected);
        assert_eq!(info.private_kernel().is_some(), private);
    }
}

#[test]
fn deleted_image_is_gone_but_hard_links_remain() {
    let state = tempfile::tempdir().unwrap();
    let images = Images::open(state.path()).unwrap();
    assert_eq!(
        images.delete(&name()).unwrap_err().kind(),
        Kind::ImageNotFound
    );
    let info = publish(&images).unwrap();
    let disk = state.path().join("disk");
    std::fs::hard_link(&info.rootfs, &disk).unwrap();
    images.delete(&name()).unwrap();
    assert_eq!(images.get(&name()).unwrap_err().kind(), Kind::ImageNotFound);
    assert_eq!(
        std::fs::read_dir(state.path().join("images"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(std::fs::read(disk).unwrap(), vec![1; 8192]);
    // A damaged image can be deleted too.
    std::fs::remove_file(publish(&images).unwrap().dir.join(KERNEL)).unwrap();
    images.delete(&name()).unwrap();
    publish(&images).unwrap();
}

#[test]
fn unfinished_builds_are_removed_at_open() {
    let state = tempfile::tempdir().unwrap();
    let images = Images::open(state.path()).unwrap();
    std::mem::forget(images.stage(&name()).unwrap());
    std::mem::forget(Staging::new(&state.path().join("images"), DELETING_PREFIX).unwrap());
    assert_eq!(
        std::fs::read_dir(state.path().join("images"))
            .unwrap()
            .count(),
        2
    );
    let images = Images::open(state.path()).unwrap();
    assert_eq!(
        std::fs::read_dir(state.path().join("images"))
            .unwrap()
            .count(),
        0
    );
    assert!(images.list().unwrap().is_empty());
}

#[test]
fn damaged_image_is_distinguished_from_a_missing_one() {
    let state = tempfile::tempdir().unwrap();
    let images = Images::open(state.path()).unwrap();
    let info = publish(&images).unwrap();
    std::fs::remove_file(info.dir.join(KERNEL)).unwrap();
    let e = images.get(&name()).unwrap_err();
    assert_eq!(e.kind(), Kind::Host);
    assert!(e.to_string().contains("vmlinux"), "{e}");
    assert!(images.list().unwrap().is_empty());
}

#[test]
fn file_that_was_rewritten_at_the_same_length_is_noticed() {
    let state = tempfile::tempdir().unwrap();
    let images = Images::open(state.path()).unwrap();
    let info = publish(&images).unwrap();
    let tag = "twin".parse().unwrap();
    let twin = Tag {
        new_name: &tag,
        owner_uid: 0,
        is_shared: true,
    };
    images.tag(&name(), &twin).unwrap();
    let before = std::fs::metadata(&info.rootfs).unwrap().modified().unwrap();
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(&info.rootfs, permissions).unwrap();
    // Writes within one tick of the file system's clock do not change the time.
    while std::fs::metadata(&info.rootfs).unwrap().modified().unwrap() == before {
        std::fs::write(&info.rootfs, vec![2; 8192]).unwrap();
    }
    for name in [&name(), &tag] {
        let e = images.get(name).unwrap_err();
        let text =
            format!("image {name} is damaged: rootfs.ext4 was written to after it was published");
        assert_eq!((e.kind(), e.to_string()), (Kind::Host, text));
        images.delete(name).unwrap();
    }
}
