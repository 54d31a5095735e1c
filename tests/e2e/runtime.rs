//! Tests of images that contain only their own files and boot with a guest runtime.

use crate::host::{Host, text, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

/// Registers the files below `tree` as an image, as `image pull` does with the files of an image.
pub fn register(host: &Host, name: &str, tree: &Path, config: Value) {
    write_image(&host.state().join("images").join(name), name, tree, config);
}

/// Writes the files below `tree` to `image`, a directory of the registry.
pub fn write_image(image: &Path, name: &str, tree: &Path, config: Value) {
    fs::create_dir(image).unwrap();
    fs::set_permissions(image, fs::Permissions::from_mode(0o755)).unwrap();
    let rootfs = image.join("rootfs.ext4");
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-E", "root_owner=0:0", "-d"])
        .args([tree, &rootfs])
        .arg("64M")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .status();
    assert!(made.unwrap().success());
    let bytes = fs::metadata(&rootfs).unwrap().len();
    let metadata = json!({
        "format": 2, "name": name, "os": "none", "kernel_version": "", "packages": [], "built_at": 1,
        "config": config, "files": [{"name": "rootfs.ext4", "bytes": bytes, "sha256": ""}],
    });
    fs::write(image.join("image.json"), metadata.to_string()).unwrap();
    for file in ["rootfs.ext4", "image.json"] {
        fs::set_permissions(image.join(file), fs::Permissions::from_mode(0o444)).unwrap();
    }
}

/// Copies the static busybox of the guest runtime to `to`.
pub fn busybox(host: &Host, to: &Path) {
    copy_busybox(&host.state().join("runtimes"), to);
}

/// Copies the static busybox of the first guest runtime in a registry to `to`.
pub fn copy_busybox(runtimes: &Path, to: &Path) {
    let runtimes = fs::read_dir(runtimes).unwrap();
    let runtime = runtimes.flatten().next().expect("a guest runtime").path();
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    let dumped = Command::new("/sbin/debugfs")
        .args(["-R", &format!("dump /bin/busybox {}", to.display())])
        .arg(runtime.join("runtime.ext4"))
        .output()
        .unwrap();
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))
        .unwrap_or_else(|e| panic!("{e}: {}", text(&dumped).1));
}

/// Creates a VM without a network and boots it.
fn boot(host: &Host, name: &str, image: &str) {
    host.ok(&[
        "vm",
        "create",
        "--name",
        name,
        "--image",
        image,
        "--net",
        "none",
        "--disk",
        "3G",
        "--work-disk",
        "64M",
    ]);
    host.ok(&["start", name]);
}

/// Checks that exit statuses and signals reach the caller.
fn check_ends(host: &Host, vm: &str) {
    for (script, status) in [
        ("exit 7", 7),
        ("kill -9 $$", 137),
        ("nothing-like-this", 127),
    ] {
        let out = host.fcctl(&["exec", vm, "--", "sh", "-c", script]);
        assert_eq!(
            out.status.code(),
            Some(status),
            "{script}: {:?}",
            text(&out)
        );
    }
    let mut sleep = host.spawn(&["exec", vm, "--", "sh", "-c", "echo here; exec sleep 100"]);
    wait_for("the command runs", || {
        (sleep.stdout() == "here\n").then_some(())
    });
    sleep.signal("TERM");
    assert_eq!(sleep.end().0, Some(143), "{}", sleep.stderr());
}

/// Copies a repository to the guest, changes it there and exports the change.
pub fn check_workspace(host: &Host, vm: &str) {
    let repo = tempfile::tempdir().unwrap();
    crate::first_light::repository(repo.path());
    host.ok(&["workspace", "prepare", vm, repo.path().to_str().unwrap()]);
    let script =
        "cat hello.txt && git log --oneline | grep -c 'First commit' && echo changed >hello.txt";
    assert_eq!(host.sh(vm, script), "hello\n1\n");
    let patch = host.ok(&["workspace", "export", vm, "--patch", "-"]);
    assert!(patch.contains("\n-hello\n+changed\n"), "{patch}");
}

/// Stops the VM, which must shut down in order, and checks its file system.
pub fn check_stop(host: &Host, vm: &str) {
    let id = host.show(vm, "id");
    host.ok(&["stop", vm]);
    assert_eq!(host.show(vm, "synced"), "yes");
    let console = host.state().join("vms").join(id.as_str().unwrap());
    let console = fs::read_to_string(console.join("console.log")).unwrap();
    assert!(console.contains("disk is clean"), "{console}");
    assert!(!console.contains("Fatal"), "{console}");
}

#[test]
fn image_of_one_static_program_boots() {
    let host = Host::start();
    host.add_runtime();
    let tree = tempfile::tempdir().unwrap();
    busybox(&host, &tree.path().join("app/busybox"));
    let config = json!({"env": ["PATH=/app", "GREETING=a  b"], "working_dir": "/srv/new"});
    register(&host, "scratch", tree.path(), config);
    boot(&host, "one", "scratch");
    assert_eq!(
        host.ok(&["exec", "one", "--", "busybox", "echo", "hello"]),
        "hello\n"
    );
    assert_eq!(
        host.sh(
            "one",
            "pwd; echo \"$GREETING $HOME $PATH\"; cat /etc/hostname; grep -c one /etc/hosts"
        ),
        "/srv/new\na  b / /app:/.fcd/bin\none\n1\n"
    );
    // The guest has the image's own files, the directories that Docker also adds, and /.fcd.
    assert_eq!(
        host.sh("one", "ls -A / | tr '\\n' ' '"),
        ".fcd app dev etc lost+found proc srv sys work "
    );
    let kib = host.sh("one", "df -k / | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2");
    assert!(
        kib.trim().parse::<u64>().unwrap() > 2 << 20,
        "the disk has grown: {kib}"
    );
    check_ends(&host, "one");
    check_workspace(&host, "one");
    check_stop(&host, "one");
    host.ok(&["start", "one"]);
    assert_eq!(host.sh("one", "cat hello.txt"), "changed\n");
}

#[test]
fn image_with_a_shell_uses_its_own_programs_and_user() {
    let host = Host::start();
    host.add_runtime();
    let tree = tempfile::tempdir().unwrap();
    let root = tree.path();
    busybox(&host, &root.join("bin/busybox"));
    for applet in ["sh", "ls", "id", "cat", "echo", "sleep", "pwd"] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::create_dir_all(root.join("home/dev")).unwrap();
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\ndev:x:1000:1000::/home/dev:/bin/sh\n",
    )
    .unwrap();
    fs::write(
        root.join("etc/group"),
        "root:x:0:\ndev:x:1000:\nvideo:x:44:dev\n",
    )
    .unwrap();
    register(&host, "small", root, json!({"user": "dev"}));
    boot(&host, "box", "small");
    assert_eq!(
        host.ok(&["exec", "box", "--", "id"]).trim(),
        "uid=1000(dev) gid=1000(dev) groups=44(video),1000(dev)"
    );
    for (user, wanted) in [
        ("root", "uid=0(root) gid=0(root) groups=0(root)"),
        ("1000:video", "uid=1000(dev) gid=44(video) groups=44(video)"),
        ("7", "uid=7 gid=0(root) groups=0(root)"),
    ] {
        let said = host.ok(&["exec", "--user", user, "box", "--", "id"]);
        assert_eq!(said.trim(), wanted, "{user}");
    }
    let (status, said) = host.fails(&["exec", "--user", "nobody", "box", "--", "id"]);
    assert!(status == 125 && said.contains("nobody"), "{status} {said}");
    assert_eq!(
        host.ok(&["ssh", "--user", "dev", "box", "--", "id", "-un"]),
        "dev\n"
    );
    // A program of the image takes precedence over the same program of the runtime.
    assert_eq!(
        host.sh(
            "box",
            "pwd; echo $HOME; ls -l /proc/self/exe | sed 's/.* -> //'; type git"
        ),
        "/\n/home/dev\n/bin/busybox\ngit is /.fcd/bin/git\n"
    );
    check_ends(&host, "box");
    let as_root =
        |vm: &str, script: &str| host.ok(&["exec", "--user", "root", vm, "--", "sh", "-c", script]);
    as_root("box", "echo before >/mark; echo work >/work/mark");
    host.ok(&["snapshot", "create", "box", "--name", "saved"]);
    as_root("box", "echo after >/mark");
    host.ok(&["snapshot", "restore", "saved", "--as", "twin"]);
    assert_eq!(
        as_root("twin", "cat /mark /work/mark /etc/hostname; hostname"),
        "before\nwork\ntwin\ntwin\n"
    );
    assert_eq!(host.ok(&["exec", "twin", "--", "id", "-un"]), "dev\n");
    assert_eq!(as_root("box", "cat /mark"), "after\n");
    check_stop(&host, "twin");
    check_stop(&host, "box");
}
