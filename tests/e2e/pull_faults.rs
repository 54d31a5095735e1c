//! Tests of pulls that are interrupted, killed at every step, or run out of space. None of them
//! boots a guest.

use crate::host::registry::{Registry, digest, layer};
use crate::host::{Host, text, wait_for, wait_for_or};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const MIB: usize = 1 << 20;

fn partials(host: &Host) -> Vec<PathBuf> {
    let dir = fs::read_dir(host.state().join("layers/partial")).unwrap();
    dir.map(|entry| entry.unwrap().path()).collect()
}

/// Returns the names in the directory of images, including those of unfinished images.
pub fn image_directories(host: &Host) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(host.state().join("images"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Waits until the pull in progress has received this much of a layer.
fn received(host: &Host, layer: &str, bytes: u64) {
    let hex = &layer["sha256:".len()..];
    wait_for("a part of the layer arrives", || {
        let mut partials = partials(host).into_iter();
        let partial = partials.find(|path| path.to_string_lossy().ends_with(hex))?;
        (fs::metadata(partial).ok()?.len() >= bytes).then_some(())
    });
    let ops = host.json(&["op", "list"]);
    let parts = ops[0]["progress"]["parts"].as_array().unwrap();
    let part = parts.iter().find(|part| part["name"] == hex[..12]).unwrap();
    assert_eq!(part["state"], "downloading", "{part}");
}

/// Pulls an image up to the middle of its last layer, then kills the daemon or interrupts the pull.
fn pull_half(registry: &Registry, host: &mut Host, name: &str, last: &str, how: &str) {
    registry.stop_at(last, 5 * MIB);
    let mut pull = host.spawn(&["image", "pull", name]);
    received(host, last, 5 * MIB as u64);
    match how {
        "killed" => host.kill_daemon(),
        _ => pull.signal("INT"),
    }
    let (status, _) = pull.end();
    assert_ne!(status, Some(0), "{}", pull.stderr());
    registry.stop_nowhere();
    if how == "killed" {
        host.relaunch();
    }
    registry.asked(last);
    // A cancelled pull first caches its complete layers.
    wait_for("the pull has ended", || {
        (image_directories(host) == ["default"]).then_some(())
    });
}

#[test]
fn interrupted_pull_continues_in_the_middle_of_a_layer() {
    let mut host = Host::start();
    host.add_runtime();
    let registry = Registry::start();
    for how in ["killed", "cancelled", "damaged"] {
        let [small, middle, large] = [
            layer(&format!("small-{how}"), 2000),
            layer(&format!("middle-{how}"), 2 * MIB),
            layer(&format!("large-{how}"), 9 * MIB),
        ];
        let (second, last) = (digest(&middle), digest(&large));
        let name = registry.publish(how, &[small, middle, large]);
        let interrupted = if how == "cancelled" { how } else { "killed" };
        pull_half(&registry, &mut host, &name, &last, interrupted);
        assert_eq!(registry.asked(&second), [0]);
        let mut wanted = vec![5 * MIB];
        if how == "damaged" {
            // The damage is found at the end of the layer, which is then fetched again.
            for path in partials(&host) {
                let file = fs::File::options().write(true).open(path).unwrap();
                file.write_all_at(&[1, 2, 3], MIB as u64).unwrap();
            }
            wanted.push(0);
        }
        host.ok(&["image", "pull", &name]);
        assert_eq!(registry.asked(&last), wanted, "{how}");
        let again: &[usize] = if how == "damaged" { &[0] } else { &[] };
        assert_eq!(registry.asked(&second), again, "{how}");
        assert_eq!(partials(&host), Vec::<PathBuf>::new(), "{how}");
        let show = host.json(&["image", "show", &name]);
        assert_eq!(show["layers"].as_array().unwrap().len(), 3, "{how}");
        host.ok(&["image", "rm", &name]);
    }
}

/// Kills the daemon at each point of an operation. After each kill, no incomplete image is visible.
/// In the end, the operation succeeds. Returns the number of points.
#[track_caller]
pub fn die_at_each_point(host: &mut Host, args: &[&str], done: &dyn Fn(&Host) -> bool) -> u64 {
    for n in 1..50 {
        let before = image_directories(host);
        host.arm(n);
        let ran = host.fcctl(args);
        let has_died = host.disarm(ran.status.code() == Some(5));
        if !has_died {
            assert!(ran.status.success(), "{args:?}: {:?}", text(&ran));
            assert!(done(host), "{args:?}");
            return n - 1;
        }
        host.relaunch();
        let at = format!("{args:?}, killed at point {n}: {:?}", text(&ran));
        let after = image_directories(host);
        assert!(
            after.iter().all(|name| !name.starts_with('.')),
            "{at}: {after:?}"
        );
        assert!(
            host.json(&["op", "list"]).as_array().unwrap().is_empty(),
            "{at}"
        );
        if !done(host) {
            let is_prune = args[1] == "prune";
            assert!(before == after || is_prune, "{at}: {before:?} {after:?}");
        } else if args[1] != "pull" {
            // The operation was complete, but the daemon died before it could reply.
            return n;
        }
    }
    panic!("{args:?} has too many points");
}

#[test]
fn killed_daemon_leaves_no_half_image() {
    let mut host = Host::start();
    host.add_runtime();
    let registry = Registry::start();
    let layers = [layer("a", 3 * MIB), layer("b", 2 * MIB)];
    let name = registry.publish("old", &layers);
    let has = |host: &Host, name: &str| {
        let images = host.json(&["image", "list"]);
        images
            .as_array()
            .unwrap()
            .iter()
            .any(|image| image["name"] == name)
    };
    let pulled = |host: &Host| has(host, &name);
    let points = die_at_each_point(&mut host, &["image", "pull", &name], &pulled);
    assert!(points >= 4, "{points} points");
    // Despite the kills, each blob was received only once.
    for layer in &layers {
        assert_eq!(registry.asked(&digest(layer)), [0]);
    }

    // A pull of other content with the same name either replaces the image or leaves it unchanged.
    let old = host.json(&["image", "show", &name])["image"]["digest"].clone();
    registry.publish("old", &[layer("c", 2 * MIB)]);
    let replaced = |host: &Host| {
        let image = host.json(&["image", "show", &name])["image"]["digest"].clone();
        assert!(image.is_string());
        image != old
    };
    die_at_each_point(&mut host, &["image", "pull", &name], &replaced);

    let tagged = |host: &Host| has(host, "mine:1");
    die_at_each_point(&mut host, &["image", "tag", &name, "mine:1"], &tagged);
    let is_untagged = |host: &Host| !has(host, "mine:1");
    die_at_each_point(&mut host, &["image", "rm", "mine:1"], &is_untagged);
    let pruned = |host: &Host| {
        let layers = fs::read_dir(host.state().join("layers")).unwrap();
        layers.count() == 1 && !has(host, &name)
    };
    die_at_each_point(&mut host, &["image", "prune", "--all"], &pruned);
}

#[test]
fn full_disk_during_pull_publishes_nothing_and_retry_works() {
    const LAYER: usize = 24 * MIB;
    let host = Host::on_small_disk(1024);
    host.add_runtime();
    let registry = Registry::start();
    let layers = [layer("a", 2 * MIB), layer("b", LAYER)];
    let name = registry.publish("big", &layers);
    let before = image_directories(&host);
    // There is room for the small layer only; then for the layers, but not for an image; then, with
    // the layers in the cache, for a part of the image.
    for leave in [8 * MIB, LAYER / 2 * 3, LAYER / 2] {
        host.disk().fill(leave as u64);
        let failed = host.fcctl(&["--json", "image", "pull", &name]);
        let (_, stderr) = text(&failed);
        assert_eq!(failed.status.code(), Some(1), "{leave}: {stderr}");
        assert!(
            stderr.contains(r#""kind":"disk_full""#) && stderr.contains(" MiB free"),
            "{leave}: {stderr}"
        );
        assert_eq!(image_directories(&host), before, "{leave}");
        assert_eq!(partials(&host), Vec::<PathBuf>::new(), "{leave}");
        host.disk().free();
    }
    let mut said = String::new();
    wait_for_or("the pull works", &mut said, |said| {
        let pulled = host.fcctl(&["image", "pull", &name]);
        *said = text(&pulled).1;
        pulled.status.success().then_some(())
    });
    // Deleting an image does not need space.
    host.disk().fill(0);
    host.ok(&["image", "rm", &name]);
    assert_eq!(image_directories(&host), before);
}
