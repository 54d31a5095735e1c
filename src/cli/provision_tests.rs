use super::super::exec::tests::{begin, status};
use super::super::tests::{fcctl, vm};
use super::{has_taken_name, interpreter, recipe_key, require_interpreter};
use crate::api::frame::Note;
use crate::api::image::Image;
use crate::api::vm::{Synced, VmState};
use crate::client::fake::{Fake, Request};
use crate::error::{Error, Kind};
use crate::locks::{Mutex, Rank};
use serde_json::{Value, json};
use std::io::Read;
use std::sync::Arc;

fn image(name: &str, recipe: Option<&str>) -> Value {
    json!({"name": name, "disk_bytes": 1, "allocated_bytes": 2, "kernel": "Linux 6.1", "os": "Debian", "built_at": 3,
        "vms": 0, "owner_uid": rustix::process::geteuid().as_raw(), "digest": "sha256:base", "recipe": recipe})
}

/// Returns the reply to `image.show`.
fn shown(image: Value) -> Value {
    json!({"image": image, "config": {}, "layers": [], "history": []})
}

/// A daemon with the image `default`, and with the image that `image.commit` makes. Commands in the
/// guest end with the status `ends`, and their input is recorded.
struct Daemon {
    fake: Fake,
    inputs: Arc<Mutex<Vec<String>>>,
}

fn daemon(ends: u8) -> Daemon {
    let inputs = Arc::new(Mutex::new(Rank::Connections, Vec::new()));
    let made = Arc::new(Mutex::new(Rank::Connections, None::<String>));
    let kept = inputs.clone();
    let fake = Fake::start(move |mut r: Request| match r.method.as_str() {
        "image.list" => {
            let made = made.lock().clone();
            let made = made.map(|recipe| image("mine", Some(&recipe)));
            let images: Vec<Value> = [image("default", None), image("debian:latest", None)]
                .into_iter()
                .chain(made)
                .collect();
            r.result(json!({"images": images}));
        }
        "image.show" => {
            let name = r.params["image"].as_str().unwrap_or_default().to_owned();
            match name.as_str() {
                "default" | "gcc:13" => r.result(shown(image(&name, None))),
                "debian" => r.result(shown(image("debian:latest", None))),
                _ => r.fault(Error::new(Kind::ImageNotFound, "no such image")),
            }
        }
        "image.pull" => r.result(json!({"image": image("gcc:13", None)})),
        "vm.create" => {
            r.note(Note::Created(Box::new(vm("web", VmState::Created))));
            r.wait_for_hangup();
        }
        "exec.start" => {
            let mut guest = begin(&mut r);
            let mut input = String::new();
            guest
                .stdin
                .take()
                .unwrap()
                .read_to_string(&mut input)
                .unwrap();
            kept.lock().push(input);
            drop(guest);
            r.result(status(ends));
        }
        "vm.stop" => {
            let mut stopped = vm("web", VmState::Stopped);
            stopped.synced = Some(Synced::Yes);
            r.result(json!({"vm": stopped}));
        }
        "image.commit" => {
            let recipe = r.params["recipe"].as_str().map(str::to_owned);
            *made.lock() = recipe.clone();
            let name = r.params["image"].as_str().unwrap_or_default().to_owned();
            r.result(json!({"image": image(&name, recipe.as_deref())}));
        }
        "image.tag" => {
            let name = r.params["name"].as_str().unwrap_or_default().to_owned();
            let recipe = made.lock().clone();
            r.result(json!({"image": image(&name, recipe.as_deref())}));
        }
        "image.delete" => {
            let deleted = r.params["image"].clone();
            r.result(json!({"deleted": deleted}));
        }
        "vm.delete" => r.result(json!({"deleted": vm("web", VmState::Stopped).id})),
        _ => r.result(json!({"vm": vm("web", VmState::Running)})),
    });
    Daemon { fake, inputs }
}

fn script(dir: &tempfile::TempDir, text: &str) -> String {
    let path = dir.path().join("script");
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn script_runs_in_vm_and_second_build_is_instant() {
    let (daemon, dir) = (daemon(0), tempfile::tempdir().unwrap());
    let path = script(&dir, "#!/bin/sh\necho hello\n");
    let args = ["image", "build", "--script", &path, "mine"];
    let ran = fcctl(&daemon.fake, &args);
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert_eq!(
        daemon.fake.methods(),
        "image.show image.list vm.create vm.start exec.start exec.start vm.stop image.commit vm.delete"
    );
    assert_eq!(*daemon.inputs.lock(), ["#!/bin/sh\necho hello\n", ""]);
    let ran = fcctl(&daemon.fake, &args);
    assert_eq!(
        (ran.status, daemon.fake.methods().as_str()),
        (0, "image.show image.list")
    );
    // The same script under another name only adds a name to the image.
    let ran = fcctl(&daemon.fake, &["image", "build", "--script", &path, "twin"]);
    let (out, methods) = (String::from_utf8(ran.out).unwrap(), daemon.fake.methods());
    assert_eq!(
        (ran.status, methods.as_str()),
        (0, "image.show image.list image.tag")
    );
    assert!(out.starts_with("twin: "), "{out}");
    assert!(
        ran.err
            .contains("image mine was already built from this base and script"),
        "{}",
        ran.err
    );
    // A changed script needs a new image, but the name is taken.
    script(&dir, "#!/bin/sh\necho other\n");
    let ran = fcctl(&daemon.fake, &args);
    assert_eq!(
        (ran.status, daemon.fake.methods().as_str()),
        (4, "image.show image.list")
    );
}

/// The caller of `image.commit` chooses the recipe, so that of another user must not be trusted.
#[test]
fn image_of_other_user_is_not_taken_for_built() {
    let dir = tempfile::tempdir().unwrap();
    let path = script(&dir, "#!/bin/sh\n");
    let mut base: Image = serde_json::from_value(image("default", None)).unwrap();
    let key = recipe_key(&base, b"#!/bin/sh\n");
    base.owner_uid = Some(4242);
    let fake = Fake::start(move |r: Request| match r.method.as_str() {
        "image.show" => r.result(shown(json!(base))),
        "image.list" => {
            let other = Image {
                name: "theirs".parse().unwrap(),
                recipe: Some(key.clone()),
                ..base.clone()
            };
            r.result(json!({"images": [base.clone(), other]}));
        }
        _ => r.fault(Error::new(Kind::Busy, "enough")),
    });
    for (name, methods) in [
        ("mine", "image.show image.list vm.create"),
        ("theirs", "image.show image.list"),
    ] {
        let ran = fcctl(&fake, &["image", "build", "--script", &path, name]);
        assert_ne!(ran.status, 0, "{name}");
        assert_eq!(fake.methods(), methods, "{name}");
    }
}

#[test]
fn base_is_resolved_and_pulled_like_the_image_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = script(&dir, "#!/bin/true\n");
    for (from, base, methods) in [
        ("debian", "debian:latest", "image.show image.list"),
        (
            "gcc",
            "gcc:13",
            "image.show image.pull image.show image.list",
        ),
    ] {
        let daemon = daemon(0);
        let args = ["image", "build", "--script", &path, "--from", from, "mine"];
        let ran = fcctl(&daemon.fake, &args);
        assert_eq!(ran.status, 0, "{}", ran.err);
        let calls = daemon.fake.calls();
        let called = calls.iter().map(|call| call.split(' ').next().unwrap());
        let called = called.collect::<Vec<_>>().join(" ");
        assert!(
            called.starts_with(&format!("{methods} vm.create")),
            "{called}"
        );
        let created = calls.iter().find(|call| call.starts_with("vm.create"));
        let named = format!(r#""image":"{base}""#);
        assert!(created.unwrap().contains(&named), "{created:?}");
    }
}

#[test]
fn default_base_is_not_pulled() {
    let dir = tempfile::tempdir().unwrap();
    let path = script(&dir, "#!/bin/true\n");
    let fake = Fake::start(|r: Request| r.fault(Error::new(Kind::ImageNotFound, "no default")));
    let ran = fcctl(&fake, &["image", "build", "--script", &path, "mine"]);
    assert_eq!((ran.status, fake.methods().as_str()), (3, "image.show"));
}

#[test]
fn failed_script_leaves_no_image_and_no_vm() {
    let (daemon, dir) = (daemon(3), tempfile::tempdir().unwrap());
    let path = script(&dir, "#!/bin/sh\nexit 3\n");
    let ran = fcctl(&daemon.fake, &["image", "build", "--script", &path, "mine"]);
    assert_eq!(ran.status, 1);
    assert!(
        ran.err.contains("the script: ended with status 3"),
        "{}",
        ran.err
    );
    assert_eq!(
        daemon.fake.methods(),
        "image.show image.list vm.create vm.start exec.start vm.delete"
    );
}

#[test]
fn included_packages_are_installed_before_the_script() {
    let (daemon, dir) = (daemon(0), tempfile::tempdir().unwrap());
    let path = script(&dir, "#!/bin/it's\nmine");
    let args = [
        "image",
        "build",
        "--include",
        "g++,cmake",
        "--script",
        &path,
        "mine",
    ];
    assert_eq!(fcctl(&daemon.fake, &args).status, 0);
    let inputs = daemon.inputs.lock();
    for part in [
        "fcd: --include needs apt-get",
        "install -- g++ cmake\n",
        r"[ -x '/bin/it'\''s' ]",
        "printf %s '#!/bin/it'\\''s\nmine' >",
    ] {
        assert!(inputs[0].contains(part), "{}", inputs[0]);
    }
}

#[test]
fn script_without_interpreter_is_refused() {
    let (daemon, dir) = (daemon(0), tempfile::tempdir().unwrap());
    for text in ["echo hello\n", "#!\necho hello\n", "#! \t", "\x7fELF"] {
        let path = script(&dir, text);
        let ran = fcctl(&daemon.fake, &["image", "build", "--script", &path, "mine"]);
        assert_eq!(ran.status, 2, "{text:?}");
        for part in ["it does not begin with a #! line", "such as #!/bin/sh"] {
            assert!(ran.err.contains(part), "{}", ran.err);
        }
        assert_eq!(daemon.fake.methods(), "");
    }
}

#[test]
fn interpreter_is_read_as_the_kernel_does() {
    for (script, program) in [
        ("#!/bin/sh", "/bin/sh"),
        ("#! /usr/bin/env  python3\nx", "/usr/bin/env"),
        ("#!\t/bin/sh\t-e\n", "/bin/sh"),
        ("#!/bin/sh\r\n", "/bin/sh\r"),
    ] {
        assert_eq!(interpreter(script.as_bytes()).as_deref(), Some(program));
    }
    let line = require_interpreter("/bin/sh\r");
    assert!(
        line.contains("fcd: the script needs /bin/sh\\r, which"),
        "{line}"
    );
}

#[test]
fn commit_goes_through_vm_of_its_own() {
    let daemon = daemon(0);
    let ran = fcctl(&daemon.fake, &["image", "commit", "web", "mine"]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert_eq!(
        daemon.fake.methods(),
        "image.commit vm.create vm.start exec.start vm.stop image.commit vm.delete image.delete"
    );
}

#[test]
fn dockerfile_is_refused_with_what_to_do() {
    let daemon = daemon(0);
    let ran = fcctl(
        &daemon.fake,
        &["image", "build", "-f", "Dockerfile", "mine"],
    );
    assert_eq!(ran.status, 2);
    assert!(
        ran.err.contains("docker save app | fcctl image pull -"),
        "{}",
        ran.err
    );
    assert_eq!(daemon.fake.methods(), "");
}

#[test]
fn host_image_does_not_take_name_from_ordinary_user() {
    let mut present: Image = serde_json::from_value(image("tools", None)).unwrap();
    for (owner, uid, is_taken) in [
        (Some(0), 0, true),
        (Some(1000), 0, true),
        (Some(1000), 1000, true),
        (None, 1000, true),
        (Some(0), 1000, false),
    ] {
        present.owner_uid = owner;
        assert_eq!(has_taken_name(&present, uid), is_taken, "{owner:?} {uid}");
    }
}
