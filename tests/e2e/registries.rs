//! Tests of all kinds of images from two registries: an open one, and one that needs a password and
//! has a certificate of a private authority.

use crate::host::{Host, text};
use crate::pulled::{Layer, Registry, put, small_image, with_type, write_index, write_layout};
use crate::runtime::{busybox, check_stop};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tar::EntryType;

/// The number of layers of one image.
const MANY: usize = 40;
/// A user without an entry in the image's files.
const NOBODY: &str = "65532:65532";

fn tool(program: &str, args: &[&str]) -> String {
    let out = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("run {program}, which scripts/setup --test installs: {e}"));
    assert!(out.status.success(), "{program} {args:?}: {:?}", text(&out));
    text(&out).0
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A registry with TLS and a password, and the files that its users need.
struct Private {
    registry: Registry,
    dir: tempfile::TempDir,
}

impl Private {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| path(&dir.path().join(name)).to_owned();
        fs::create_dir(at("trusted")).unwrap();
        let new = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost";
        let openssl = |args: &str| {
            let args: Vec<String> = args
                .split(' ')
                .map(|arg| arg.replace('@', &at("")))
                .collect();
            tool(
                "openssl",
                &args.iter().map(String::as_str).collect::<Vec<_>>(),
            );
        };
        openssl(&format!(
            "{new} -x509 -days 2 -keyout @ca.key -out @trusted/ca.crt"
        ));
        openssl(&format!("{new} -keyout @key.pem -out @request"));
        fs::write(at("names"), "subjectAltName=DNS:localhost\n").unwrap();
        openssl(
            "x509 -req -days 2 -CAcreateserial -in @request -CA @trusted/ca.crt -CAkey @ca.key -extfile @names -out @cert.pem",
        );
        fs::write(at("htpasswd"), tool("htpasswd", &["-Bbn", "ann", "canary"])).unwrap();
        let registry = Registry::with(dir.path(), |address| {
            format!(
                "http: {{addr: {address}, tls: {{certificate: {}, key: {}}}}}\nauth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                at("cert.pem"),
                at("key.pem"),
                at("htpasswd")
            )
        });
        Self { registry, dir }
    }

    /// Returns the registry's address with a host name, because the certificate is not valid for
    /// the IP address.
    fn name(&self) -> String {
        self.registry.address.replace("127.0.0.1", "localhost")
    }

    fn trusted(&self) -> PathBuf {
        self.dir.path().join("trusted")
    }

    /// Writes docker's `config.json` with the password, and returns its directory.
    fn log_in(&self) -> PathBuf {
        let dir = self.dir.path().join("docker");
        fs::create_dir(&dir).unwrap();
        let config = dir.join("config.json");
        let trusted = self.trusted();
        let to = ["--authfile", path(&config), "--cert-dir", path(&trusted)];
        let user = ["-u", "ann", "-p", "canary", &self.name()];
        tool("skopeo", &[&["login"][..], &to, &user].concat());
        dir
    }
}

/// Copies an image from a layout to a registry with skopeo.
fn push(layout: &Path, to: &str, options: &[&str]) {
    let from = format!("oci:{}:1", layout.display());
    let to = format!("docker://{to}");
    let copy = ["--insecure-policy", "copy", "-q"];
    tool("skopeo", &[&copy[..], options, &[&from, &to]].concat());
}

/// Writes the layout of an image with one static program and nothing else. The first image of its
/// index is for another processor.
fn scratch(host: &Host, layout: &Path) {
    let program = layout.join("program");
    busybox(host, &program);
    let program = fs::read(&program).unwrap();
    let file = |content: &[u8]| {
        let layer = Layer::new().dir("app");
        layer
            .entry("app/busybox", EntryType::Regular, 0o755, content)
            .finish()
    };
    let config =
        json!({"Entrypoint": ["/app/busybox"], "Cmd": ["echo", "scratch"], "Env": ["PATH=/app"]});
    let mut manifests = Vec::new();
    for (processor, content) in [
        ("arm64", &b"\x7fELF of another processor"[..]),
        ("amd64", &program),
    ] {
        let mut manifest = write_layout(layout, &[file(content)], config.clone());
        manifest["platform"] = json!({"architecture": processor, "os": "linux"});
        manifests.push(manifest);
    }
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
    });
    let index = with_type(put(layout, index.to_string().as_bytes()), "index.v1+json");
    write_index(layout, index);
}

/// Writes the layout of an image with a program that needs musl, below 40 layers that each replace
/// a file of the previous layer.
fn musl(layout: &Path) {
    let source = layout.join("program.c");
    fs::write(
        &source,
        "#include <stdio.h>\nint main(int n, char **v) { puts(\"musl\"); return n; }\n",
    )
    .unwrap();
    let program = layout.join("program");
    tool("musl-gcc", &["-o", path(&program), path(&source)]);
    let loader = fs::read("/lib/ld-musl-x86_64.so.1").unwrap();
    let lowest = Layer::new()
        .dir("lib")
        .entry(
            "lib/ld-musl-x86_64.so.1",
            EntryType::Regular,
            0o755,
            &loader,
        )
        .dir("bin")
        .entry(
            "bin/program",
            EntryType::Regular,
            0o755,
            &fs::read(&program).unwrap(),
        )
        .dir("layers");
    let mut layers = vec![lowest.finish()];
    layers.extend((1..MANY).map(|n| {
        let layer = Layer::new().file("layers/last", &format!("{n}\n"));
        layer.file(&format!("layers/{n}"), "").finish()
    }));
    write_layout(layout, &layers, json!({"Cmd": ["/bin/program"]}));
}

/// Writes the layout of [`small_image`], and changes the image and its user with umoci.
fn changed_by_umoci(host: &Host, layout: &Path) {
    small_image(host, layout);
    let image = format!("{}:1", layout.display());
    let bundle = layout.join("bundle");
    tool("umoci", &["unpack", "--image", &image, path(&bundle)]);
    let data = bundle.join("rootfs/data");
    fs::remove_file(data.join("kept")).unwrap();
    fs::write(data.join("added"), "added\n").unwrap();
    fs::hard_link(data.join("added"), data.join("twin")).unwrap();
    tool("umoci", &["repack", "--image", &image, path(&bundle)]);
    tool(
        "umoci",
        &["config", "--image", &image, "--config.user", "1000:1000"],
    );
    fs::remove_dir_all(bundle).unwrap();
}

/// Commits an image to a registry with buildah. The image has a program of this host and its
/// libraries, but no shell.
fn distroless_by_buildah(registry: &Private, to: &str) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    for file in [
        "/usr/bin/env",
        "/lib64/ld-linux-x86-64.so.2",
        "/lib/x86_64-linux-gnu/libc.so.6",
    ] {
        let to = tree.join(&file[1..]);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    }
    let policy = dir.path().join("policy.json");
    fs::write(
        &policy,
        r#"{"default": [{"type": "insecureAcceptAnything"}]}"#,
    )
    .unwrap();
    let (root, run) = (dir.path().join("root"), dir.path().join("run"));
    let storage = [
        "--root",
        path(&root),
        "--runroot",
        path(&run),
        "--storage-driver",
        "vfs",
    ];
    let buildah = |args: &[&str]| tool("buildah", &[&storage[..], args].concat());
    let policy = ["--signature-policy", path(&policy)];
    buildah(&[&["from", "--name", "new"][..], &policy, &["scratch"]].concat());
    buildah(&["copy", "new", path(&tree), "/"]);
    buildah(&[
        "config",
        "--user",
        NOBODY,
        "--entrypoint",
        r#"["/usr/bin/env"]"#,
        "new",
    ]);
    let trusted = registry.trusted();
    let access = ["--creds", "ann:canary", "--cert-dir", path(&trusted)];
    let to = format!("docker://{to}");
    buildah(&[&["commit", "-q"][..], &policy, &access, &["new", &to]].concat());
}

/// An image, and the expected output of its files and its command.
struct Case {
    name: &'static str,
    reference: String,
    /// A script that the runtime's shell runs in the workspace, and what it prints.
    script: &'static str,
    says: &'static str,
    /// The user and the directory of the workspace.
    place: &'static str,
    /// The output of the image's own command, or of its entrypoint with the arguments.
    own: &'static [&'static str],
    own_says: &'static str,
}

/// Pulls the image, copies a repository into its guest, changes it there, and brings the change
/// back. The guest has no network.
fn check(host: &Host, docker: &Path, case: &Case) {
    let repo = tempfile::tempdir().unwrap();
    let repo = repo.path().join("repo");
    fs::create_dir(&repo).unwrap();
    crate::first_light::repository(&repo);
    let script = format!(
        "{} && git log --oneline | grep -c 'First commit' && echo \"$(id -u) $PWD\" && echo changed >hello.txt; exit 7",
        case.script
    );
    let place = ["--name", case.name, "--net", "none", "--entrypoint", ""];
    let run = ["run", "--image", &case.reference, path(&repo)];
    let command = ["--", "sh", "-c", &script];
    let out = host
        .command(&[&run[..], &place, &command].concat())
        .env("DOCKER_CONFIG", docker)
        .output()
        .unwrap();
    let (said, err) = text(&out);
    assert_eq!(
        (out.status.code(), said.as_str()),
        (
            Some(7),
            format!("{}1\n{}\n", case.says, case.place).as_str()
        ),
        "{}: {err}",
        case.name
    );
    let own = host.ok(&[&["exec", case.name, "--"][..], case.own].concat());
    assert!(own.starts_with(case.own_says), "{}: {own}", case.name);
    host.ok(&["workspace", "apply", case.name, "-C", path(&repo)]);
    assert_eq!(
        fs::read_to_string(repo.join("hello.txt")).unwrap(),
        "changed\n"
    );
    check_stop(host, case.name);
}

#[test]
fn every_kind_of_image_boots_from_open_and_private_registries() {
    let private = Private::start();
    let trusted = private.trusted().join("ca.crt");
    let host = Host::with_config(&format!(
        "[registry]\nauthorities = [\"{}\"]\n",
        trusted.display()
    ));
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    let open = Registry::start(dir.path());
    let layout = |name: &str| {
        let layout = dir.path().join(name);
        fs::create_dir(&layout).unwrap();
        layout
    };
    let in_open = |name: &str| format!("{}/team/{name}:1", open.address);
    let in_private = |name: &str| format!("{}/team/{name}:1", private.name());
    let plain = ["--dest-tls-verify=false"];
    let zstd = ["--dest-compress-format", "zstd"];
    let access_args = [
        format!("--dest-cert-dir={}", private.trusted().display()),
        "--dest-creds=ann:canary".to_owned(),
    ];
    let access: Vec<&str> = access_args.iter().map(String::as_str).collect();

    let at = layout("scratch");
    scratch(&host, &at);
    push(&at, &in_open("scratch"), &[&plain[..], &["--all"]].concat());
    let at = layout("musl");
    musl(&at);
    push(&at, &in_private("musl"), &[&access[..], &zstd].concat());
    let at = layout("umoci");
    changed_by_umoci(&host, &at);
    push(&at, &in_open("umoci"), &plain);
    distroless_by_buildah(&private, &in_private("buildah"));

    let docker = dir.path().join("docker");
    let (status, said) = host.fails(&["image", "pull", &in_private("musl")]);
    assert!(
        status == 1 && said.contains("fcctl login"),
        "{status} {said}"
    );
    fs::rename(private.log_in(), &docker).unwrap();
    let cases = [
        Case {
            name: "scratch",
            reference: in_open("scratch"),
            script: "ls -A /app",
            says: "busybox\n",
            place: "0 /root/repo",
            own: &["busybox", "echo", "scratch"],
            own_says: "scratch\n",
        },
        Case {
            name: "musl",
            reference: in_private("musl"),
            script: "ls /layers | wc -l; cat /layers/last; ! [ -e /bin/sh ]",
            says: "40\n39\n",
            place: "0 /root/repo",
            own: &["sh", "-c", "/bin/program 2 3; echo $?"],
            own_says: "musl\n3\n",
        },
        Case {
            name: "umoci",
            reference: in_open("umoci"),
            script: "ls /data; cat /data/linked; [ /data/added -ef /data/twin ] && echo same",
            says: "added\nlinked\ntwin\nkept\nsame\n",
            place: "1000 /workspace/repo",
            own: &["/bin/sh", "-c", "echo $GREETING"],
            own_says: "hello\n",
        },
        Case {
            name: "buildah",
            reference: in_private("buildah"),
            script: "! [ -e /bin/sh ]",
            says: "",
            place: "65532 /workspace/repo",
            own: &["/usr/bin/env", "FIRST=word"],
            own_says: "",
        },
    ];
    cases.iter().for_each(|case| check(&host, &docker, case));
    // The layers are compressed as requested.
    let kind = [
        "inspect",
        "--raw",
        &access_args[0].replace("dest-", ""),
        "--creds=ann:canary",
    ];
    let reference = format!("docker://{}", in_private("musl"));
    let manifest = tool("skopeo", &[&kind[..], &[&reference]].concat());
    assert_eq!(
        manifest.matches("layer.v1.tar+zstd").count(),
        MANY,
        "{manifest}"
    );
}
