//! Tests of image pulls by a daemon with fakes, except that the helper process is real.

use crate::world::{SOON, World, await_that, pipe};
use fcd::testing::api::image::*;
use fcd::testing::config::Config;
use fcd::testing::host::confine;
use fcd::testing::ids::ImageRef;
use fcd::testing::image::runtime::own_digest;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::Ordering;

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let media_type = format!("application/vnd.oci.image.{media_type}");
    json!({ "mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len() })
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Returns an oci-archive of an image with one file, which is named `app:1`.
fn archive(content: &str) -> Vec<u8> {
    let layer = tar(&[("file", content.as_bytes())]);
    let layers = [descriptor("layer.v1.tar", &layer)];
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [layers[0]["digest"]] },
    })
    .to_string();
    let described = descriptor("config.v1+json", config.as_bytes());
    let manifest = json!({ "schemaVersion": 2, "config": described, "layers": layers }).to_string();
    let mut root = descriptor("manifest.v1+json", manifest.as_bytes());
    root["annotations"] = json!({ "io.containerd.image.name": "docker.io/library/app:1" });
    let index = json!({ "schemaVersion": 2, "manifests": [root] }).to_string();
    let path = |of: &Value| {
        let digest = of["digest"].as_str().unwrap();
        format!("blobs/sha256/{}", &digest["sha256:".len()..])
    };
    tar(&[
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        ("index.json", index.as_bytes()),
        (&path(&root), manifest.as_bytes()),
        (&path(&described), config.as_bytes()),
        (&path(&layers[0]), &layer),
    ])
}

/// Returns a world that has a guest runtime of this build, so that no pull builds one.
fn world() -> World {
    world_with(|_| {})
}

fn world_without_runtime(change: impl FnOnce(&mut Config)) -> World {
    confine::set_program(env!("CARGO_BIN_EXE_fcd"));
    World::with(|config| {
        // One pull is reserved for other users, and a test begins three pulls.
        config.registry.pulls_max = 4;
        change(config);
    })
}

pub fn world_with(change: impl FnOnce(&mut Config)) -> World {
    let world = world_without_runtime(change);
    let id = "00000000000a";
    let dir = world.config.state_dir.join("runtimes").join(id);
    std::fs::create_dir_all(&dir).unwrap();
    let files = ["vmlinux", "initrd", "runtime.ext4"].map(|name| {
        std::fs::write(dir.join(name), id).unwrap();
        json!({"name": name, "bytes": id.len(), "sha256": ""})
    });
    let runtime = json!({
        "id": id, "kernel_version": "6.1", "packages": [], "built_at": u32::MAX,
        "own_digest": own_digest(), "files": files,
    });
    std::fs::write(dir.join("runtime.json"), runtime.to_string()).unwrap();
    world
}

pub fn request(shared: bool) -> ImagePullRequest {
    ImagePullRequest {
        source: PullSource::Archive {
            format: None,
            reference: None,
        },
        name: None,
        platform: None,
        shared,
    }
}

/// Returns the read end of a pipe that contains an archive. The archive fits into the pipe.
pub fn stream(content: &str) -> OwnedFd {
    let (theirs, ours) = pipe();
    File::from(ours).write_all(&archive(content)).unwrap();
    theirs
}

pub fn pull(world: &World, content: &str, shared: bool) -> Image {
    let fds = vec![stream(content)];
    let mut call = world.begin::<ImagePull>(request(shared), fds);
    call.finish(SOON).unwrap().image
}

fn metadata(state_dir: &Path) -> Value {
    let text = std::fs::read(state_dir.join("images/app:1/image.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn is_private(world: &World) -> bool {
    metadata(&world.config.state_dir)["private"] == json!(true)
}

#[test]
fn present_image_becomes_shared_and_stays_shared_when_it_is_replaced() {
    let world = world();
    let first = pull(&world, "one", false);
    assert!(is_private(&world));
    assert_eq!(pull(&world, "one", true).digest, first.digest);
    assert!(!is_private(&world), "--shared has no effect");
    let second = pull(&world, "two", false);
    assert_ne!(second.digest, first.digest);
    assert!(!is_private(&world), "the new image is private");
    // A pull of the same image without --shared changes nothing.
    pull(&world, "two", false);
    assert!(!is_private(&world));
}

#[test]
fn pull_waits_for_another_pull_of_the_same_name() {
    let world = world();
    world.builds.checks_are_held.store(true, Ordering::SeqCst);
    let mut first = world.begin::<ImagePull>(request(false), vec![stream("one")]);
    first.stage("write");
    let mut second = world.begin::<ImagePull>(request(false), vec![stream("one")]);
    second.stage("wait for another pull of app:1");
    // A pull that waits can be cancelled.
    let third = world.begin::<ImagePull>(request(false), vec![stream("one")]);
    third.stage("wait for another pull of app:1");
    drop(third);
    world.builds.checks_are_held.store(false, Ordering::SeqCst);
    let first = first.finish(SOON).unwrap().image;
    let second = second.finish(SOON).unwrap().image;
    assert_eq!(first, second);
}

/// Building a guest runtime needs as much memory as building an image, so both wait in one queue.
#[test]
fn runtime_is_built_after_other_builds() {
    let world = world_without_runtime(|config| config.registry.pulls_max = 1);
    world.builds.are_held.store(true, Ordering::SeqCst);
    let request_build = ImageBuildRequest {
        name: Some("built".parse().unwrap()),
        ..ImageBuildRequest::default()
    };
    let mut build = world.begin::<ImageBuild>(request_build, vec![]);
    await_that("the build runs", || {
        world.builds.running.load(Ordering::SeqCst) == 1
    });
    let pulls = ["one", "two"].map(|content| {
        let request = ImagePullRequest {
            name: Some(content.parse().unwrap()),
            ..request(false)
        };
        let pull = world.begin::<ImagePull>(request, vec![stream(content)]);
        // A pull that waits for a build does not block other pulls.
        pull.stage("wait for another build");
        pull
    });
    world.builds.are_held.store(false, Ordering::SeqCst);
    build.finish(SOON).unwrap_err();
    for mut pull in pulls {
        // Builds always fail in these tests.
        let e = pull.finish(SOON).unwrap_err();
        assert!(e.to_string().contains("build the guest runtime"), "{e}");
    }
    assert_eq!(world.builds.peak.load(Ordering::SeqCst), 1);
}

#[test]
fn image_with_long_history_is_shown() {
    let world = world();
    let image: ImageRef = "default".parse().unwrap();
    let long = "x".repeat(40 << 10);
    let steps: Vec<Value> = (0..40)
        .map(|n| json!({ "created_by": format!("{n} {long}") }))
        .collect();
    let details = json!({ "layers": [], "history": steps });
    let path = world.config.state_dir.join("images/default/details.json");
    std::fs::write(path, details.to_string()).unwrap();
    let shown = world.call::<ImageShow>(&ImageRequest { image }).unwrap();
    assert!((20..40).contains(&shown.history.len()));
    assert_eq!(shown.history.len() as u64 + shown.history_omitted, 40);
    let newest = shown.history.last().unwrap().created_by.clone().unwrap();
    assert!(newest.starts_with("39 xxx") && newest.ends_with("x [...]"));
}
