//! Tests of images that are pulled from a registry on loopback and from archives.

use crate::host::{Host, text, wait_for};
use crate::runtime::busybox;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A tar archive that is built entry by entry.
pub struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub fn entry(mut self, path: &str, kind: tar::EntryType, mode: u32, content: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        header.set_mtime(1_700_000_000);
        self.0.append_data(&mut header, path, content).unwrap();
        self
    }

    pub fn dir(self, path: &str) -> Self {
        self.entry(path, tar::EntryType::Directory, 0o755, &[])
    }

    pub fn file(self, path: &str, content: &str) -> Self {
        self.entry(path, tar::EntryType::Regular, 0o644, content.as_bytes())
    }

    pub fn link(mut self, path: &str, target: &str, kind: tar::EntryType) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o777);
        header.set_size(0);
        self.0.append_link(&mut header, path, target).unwrap();
        self
    }

    pub fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub fn put(layout: &Path, bytes: &[u8]) -> Value {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(&hex), bytes).unwrap();
    json!({ "digest": format!("sha256:{hex}"), "size": bytes.len() })
}

pub fn with_type(mut descriptor: Value, media_type: &str) -> Value {
    descriptor["mediaType"] = json!(format!("application/vnd.oci.image.{media_type}"));
    descriptor
}

/// Writes a layout directory with one image, whose tag is `1`. Returns the image's descriptor.
pub fn write_layout(layout: &Path, layers: &[Vec<u8>], config: Value) -> Value {
    let described: Vec<Value> = layers
        .iter()
        .map(|layer| with_type(put(layout, layer), "layer.v1.tar"))
        .collect();
    // The layers are not compressed, so their blobs are their tars.
    let diff_ids: Vec<&Value> = described.iter().map(|layer| &layer["digest"]).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": [{ "created": "2024-05-06T07:08:09Z", "created_by": "COPY all" }],
    });
    let config = with_type(put(layout, config.to_string().as_bytes()), "config.v1+json");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": described,
    });
    let manifest = with_type(
        put(layout, manifest.to_string().as_bytes()),
        "manifest.v1+json",
    );
    write_index(layout, manifest.clone());
    manifest
}

/// Writes an index in which the described image has the tag `1`.
pub fn write_index(layout: &Path, mut described: Value) {
    described["annotations"] = json!({ "org.opencontainers.image.ref.name": "1" });
    let index = json!({ "schemaVersion": 2, "manifests": [described] });
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}

/// Writes the layout of an image with busybox, a whiteout, and a hard link across layers.
pub fn small_image(host: &Host, layout: &Path) {
    let program = layout.join("busybox");
    busybox(host, &program);
    let program = fs::read(&program).unwrap();
    let lower = Layer::new()
        .dir("bin")
        .entry("bin/busybox", tar::EntryType::Regular, 0o755, &program)
        .link("bin/sh", "busybox", tar::EntryType::Symlink)
        .dir("data")
        .file("data/gone", "x")
        .file("data/kept", "kept\n");
    let upper = Layer::new()
        .file("data/.wh.gone", "")
        .link("data/linked", "data/kept", tar::EntryType::Link)
        .dir("srv");
    let config = json!({
        "Cmd": ["/bin/sh", "-c", "echo $GREETING from $PWD; exit 3"],
        "Env": ["GREETING=hello"], "WorkingDir": "/srv",
    });
    write_layout(layout, &[lower.finish(), upper.finish()], config);
}

/// A process of Debian's docker-registry on a loopback port. Dropping it ends the process.
pub struct Registry {
    process: Child,
    pub address: String,
}

impl Registry {
    pub fn start(dir: &Path) -> Self {
        Self::with(dir, |address| format!("http: {{addr: {address}}}\n"))
    }

    /// Starts a registry with additions to its configuration.
    pub fn with(dir: &Path, configure: impl Fn(&str) -> String) -> Self {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = format!("127.0.0.1:{port}");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n{}",
            dir.join("registry").display(),
            configure(&address)
        );
        fs::write(dir.join("registry.yml"), config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.join("registry.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed by scripts/setup --test");
        wait_for("the registry listens", || {
            std::net::TcpStream::connect(&address).ok()
        });
        Self { process, address }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn skopeo(from: &str, to: &str) {
    let copied = Command::new("skopeo")
        .args([
            "copy",
            "-q",
            "--insecure-policy",
            "--dest-tls-verify=false",
            from,
            to,
        ])
        .output()
        .expect("skopeo is installed by scripts/setup --test");
    assert!(copied.status.success(), "{:?}", text(&copied));
}

#[test]
fn image_from_registry_is_pulled_on_demand_and_runs_its_own_command() {
    let host = Host::start();
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    fs::create_dir(&layout).unwrap();
    small_image(&host, &layout);
    let registry = Registry::start(dir.path());
    let name = format!("{}/team/small:1", registry.address);
    skopeo(
        &format!("oci:{}:1", layout.display()),
        &format!("docker://{name}"),
    );

    // The image is pulled, and its own command runs.
    let ran = host.fcctl(&["run", "--image", &name, "--name", "box", "--net", "none"]);
    let (out, err) = text(&ran);
    assert_eq!(
        (ran.status.code(), out.as_str()),
        (Some(3), "hello from /srv\n"),
        "{err}"
    );
    assert_eq!(
        host.sh(
            "box",
            "cat /data/linked; ls /data; cd /data && [ kept -ef linked ] && echo same"
        ),
        "kept\nkept\nlinked\nsame\n"
    );
    let show: Value = serde_json::from_str(&host.ok(&["image", "show", &name, "--json"])).unwrap();
    assert_eq!(show["config"]["working_dir"], "/srv");
    assert_eq!(show["layers"].as_array().unwrap().len(), 2);
    assert!(host.ok(&["image", "history", &name]).contains("COPY all"));

    // A second pull changes nothing. An image in use cannot be deleted.
    host.ok(&["image", "pull", &name]);
    let (status, said) = host.fails(&["image", "rm", &name]);
    assert!(status != 0 && said.contains("it is used by 1 VM"), "{said}");
    host.ok(&["image", "tag", &name, "mine:2"]);
    host.ok(&["rm", "-f", "box"]);
    host.ok(&["image", "rm", &name]);
    assert!(host.ok(&["image", "ls"]).contains("mine:2"));
    host.ok(&["image", "prune", "--all"]);
    // The directory of partial downloads stays.
    assert_eq!(
        fs::read_dir(host.state().join("layers")).unwrap().count(),
        1
    );
    assert!(!host.ok(&["image", "ls"]).contains("mine:2"));
    let (status, said) = host.fails(&[
        "image",
        "pull",
        &format!("{}/team/none:1", registry.address),
    ]);
    assert!(
        status == 3 && said.contains("does not have it"),
        "{status} {said}"
    );
}

#[test]
fn archives_are_pulled_from_files_directories_and_stdin() {
    let host = Host::start();
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    fs::create_dir(&layout).unwrap();
    small_image(&host, &layout);
    let source = format!("oci:{}:1", layout.display());
    let oci = dir.path().join("oci.tar");
    let docker = dir.path().join("docker.tar");
    skopeo(&source, &format!("oci-archive:{}:1", oci.display()));
    skopeo(
        &source,
        &format!("docker-archive:{}:app:5", docker.display()),
    );

    host.ok(&["image", "pull", &source, "--name", "layout:1"]);
    host.ok(&[
        "image",
        "pull",
        &format!("oci-archive:{}", oci.display()),
        "--name",
        "oci:1",
    ]);
    // A docker-archive contains the name of its image.
    host.ok(&[
        "image",
        "pull",
        &format!("docker-archive:{}", docker.display()),
    ]);
    let stdin = fs::File::open(&docker).unwrap();
    let piped = host
        .command(&["image", "pull", "-", "--name", "piped:1"])
        .stdin(stdin)
        .output();
    let piped = piped.unwrap();
    assert!(piped.status.success(), "{:?}", text(&piped));
    let list = host.ok(&["image", "ls"]);
    for name in ["layout:1", "oci:1", "app:5", "piped:1"] {
        assert!(list.contains(name), "{name}: {list}");
    }
    // The archives have the layers of the layout, compressed or not.
    let layers = |name: &str| host.json(&["image", "show", name])["layers"].clone();
    for name in ["oci:1", "app:5", "piped:1"] {
        assert_eq!(layers(name), layers("layout:1"), "{name}");
    }

    // An export has the image's own layers, in both formats.
    let exported = dir.path().join("exported.tar");
    let to = exported.to_str().unwrap();
    host.ok(&["image", "export", "app:5", "-o", to]);
    for format in ["oci-archive", "docker-archive"] {
        host.ok(&["image", "pull", &format!("{format}:{to}"), "--name", format]);
        assert_eq!(layers(format), layers("layout:1"), "{format}");
    }
    let shown = host.json(&["image", "show", "oci-archive"]);
    assert_eq!(
        shown["config"],
        host.json(&["image", "show", "app:5"])["config"]
    );

    for (bad, says) in [
        ("oci:/nonexistent", "/nonexistent"),
        ("oci-archive:/etc/passwd", "the archive"),
        ("UPPER", "not a reference"),
    ] {
        let (status, said) = host.fails(&["image", "pull", bad, "--name", "bad"]);
        assert!(status != 0 && said.contains(says), "{bad}: {said}");
    }
    assert!(!host.ok(&["image", "ls"]).contains("bad"));
}
