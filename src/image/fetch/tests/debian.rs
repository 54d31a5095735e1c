//! Tests with Debian's `docker-registry` on loopback, which skopeo fills: without authentication,
//! with a password, and with TLS. `scripts/setup --test` installs both.

use super::*;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const LAYER_BYTES: usize = 3 << 20;

/// A registry with the image `app:v1`. Dropping it ends the process.
struct Registry {
    dir: tempfile::TempDir,
    name: String,
    process: Child,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[allow(clippy::disallowed_methods)] // host::command clears the environment and cannot run servers.
fn command(program: &str) -> Command {
    Command::new(program)
}

fn run(program: &str, args: &[&str]) -> String {
    let output = command(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("run {program} (scripts/setup --test): {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Registry {
    /// Starts a registry with additions to its configuration, and pushes the image with additional
    /// options of skopeo.
    fn start(configure: impl Fn(&Path) -> String, push: &[&str]) -> Self {
        // Another process may take the port before the registry does.
        for _ in 0..5 {
            let dir = tempfile::tempdir().unwrap();
            let free = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = free.local_addr().unwrap().port();
            drop(free);
            let config = format!(
                "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n{}",
                text(&dir.path().join("storage")),
                configure(dir.path()).replace("ADDR", &format!("127.0.0.1:{port}"))
            );
            let path = dir.path().join("config.yml");
            std::fs::write(&path, config).unwrap();
            let mut process = command("docker-registry")
                .args(["serve", text(&path)])
                .stderr(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap_or_else(|e| panic!("run docker-registry (scripts/setup --test): {e}"));
            let listens = says_that_it_listens(&mut process);
            let registry = Self {
                dir,
                name: format!("localhost:{port}"),
                process,
            };
            if listens {
                registry.push(push);
                return registry;
            }
        }
        panic!("docker-registry does not listen");
    }

    fn push(&self, options: &[&str]) {
        let layout = self.dir.path().join("layout");
        make_layout(&layout);
        let from = format!("oci:{}:v1", text(&layout));
        let to = format!("docker://{}/app:v1", self.name);
        let mut args = vec!["--insecure-policy", "copy", "-q", "--preserve-digests"];
        let options: Vec<_> = options
            .iter()
            .map(|option| option.replace("DIR", text(self.dir.path())))
            .collect();
        args.extend(options.iter().map(String::as_str));
        args.extend([from.as_str(), to.as_str()]);
        run("skopeo", &args);
    }

    fn settings(&self) -> Settings {
        settings(&self.name)
    }
}

/// Returns true once the registry logs that it listens. Another thread then reads the rest of the
/// log, so that the registry never blocks on it.
fn says_that_it_listens(process: &mut Child) -> bool {
    let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
    let found = lines.any(|line| line.unwrap().contains("listening on"));
    crate::host::thread::spawn("registry log", move || lines.for_each(drop)).unwrap();
    found
}

/// Makes an OCI layout with an image of one layer.
fn make_layout(at: &Path) {
    let blobs = at.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = sha256(bytes);
        std::fs::write(blobs.join(&digest[7..]), bytes).unwrap();
        digest
    };
    // This is not a tar, but neither skopeo nor the registry looks into it.
    let mut layer = b"\x1f\x8b\x08".to_vec();
    layer.extend((0..LAYER_BYTES).map(|n| (n * n / 251) as u8));
    let layer_digest = put(&layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":["{layer_digest}"]}}}}"#
    );
    let config_digest = put(config.as_bytes());
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config_digest}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{layer_digest}","size":{}}}]}}"#,
        config.len(),
        layer.len()
    );
    let digest = put(manifest.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{OCI}","digest":"{digest}","size":{},"annotations":{{"org.opencontainers.image.ref.name":"v1"}}}}]}}"#,
        manifest.len()
    );
    std::fs::write(at.join("index.json"), index).unwrap();
    std::fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// Pulls the image: the manifest, the configuration, and the layer.
#[track_caller]
fn pull(settings: Settings) {
    let mut client = client(settings);
    let manifest = client.manifest(&tag()).unwrap();
    assert_eq!(manifest.media_type, OCI);
    let by_digest = Selector::Digest(manifest.digest.clone());
    assert_eq!(client.manifest(&by_digest).unwrap(), manifest);
    let parsed: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap();
    for descriptor in [&parsed["config"], &parsed["layers"][0]] {
        let digest = descriptor["digest"].as_str().unwrap();
        let size = descriptor["size"].as_u64().unwrap();
        let bytes = client.blob_bytes(digest, size, 1 << 30).unwrap();
        assert_eq!(bytes.len() as u64, size);
    }
    let missing = client.manifest(&Selector::Tag("v2".into()));
    fails(missing, Kind::ReferenceNotFound);
}

const OPEN: &str = "http: {addr: \"ADDR\"}\n";

#[test]
fn image_is_pulled_without_authentication() {
    let registry = Registry::start(|_| OPEN.to_owned(), &["--dest-tls-verify=false"]);
    pull(registry.settings());
}

#[test]
fn password_is_needed_and_accepted() {
    let with_password = |dir: &Path| {
        let file = dir.join("htpasswd");
        std::fs::write(&file, run("htpasswd", &["-Bbn", "ann", "canary"])).unwrap();
        format!(
            "{OPEN}auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
            text(&file)
        )
    };
    let options = ["--dest-tls-verify=false", "--dest-creds=ann:canary"];
    let registry = Registry::start(with_password, &options);
    fails(
        client(registry.settings()).manifest(&tag()),
        Kind::RegistryDenied,
    );
    let mut settings = registry.settings();
    settings.credential = Credential::Basic {
        user: "ann".into(),
        password: Secret::new("wrong"),
    };
    let text = fails(
        client(settings.clone()).manifest(&tag()),
        Kind::RegistryDenied,
    );
    assert!(
        text.ends_with("UNAUTHORIZED: authentication required"),
        "{text}"
    );
    settings.credential = basic();
    pull(settings);
}

/// Makes an authority and a certificate for `localhost`. Returns the path of the authority's
/// certificate.
fn make_certificate(dir: &Path) -> PathBuf {
    let at = |name: &str| text(&dir.join(name)).to_owned();
    let new = [
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ];
    std::fs::create_dir(dir.join("trusted")).unwrap();
    let (ca, ca_key) = (at("trusted/ca.crt"), at("ca.key"));
    let of_ca = [
        "-x509", "-days", "2", "-subj", "/CN=test", "-keyout", &ca_key, "-out", &ca,
    ];
    run("openssl", &[&new[..], &of_ca].concat());
    let (request, key, cert) = (at("request"), at("key.pem"), at("cert.pem"));
    let of_server = ["-subj", "/CN=localhost", "-keyout", &key, "-out", &request];
    run("openssl", &[&new[..], &of_server].concat());
    let names = at("names");
    std::fs::write(&names, "subjectAltName=DNS:localhost\n").unwrap();
    let sign = [
        "x509",
        "-req",
        "-days",
        "2",
        "-CAcreateserial",
        "-in",
        &request,
        "-CA",
        &ca,
    ];
    let to = ["-CAkey", &ca_key, "-extfile", &names, "-out", &cert];
    run("openssl", &[&sign[..], &to].concat());
    ca.into()
}

#[test]
fn certificate_of_private_authority_is_trusted_if_named() {
    let with_tls = |dir: &Path| {
        make_certificate(dir);
        let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        format!(
            "http: {{addr: \"ADDR\", tls: {{certificate: {}, key: {}}}}}\n",
            text(&cert),
            text(&key)
        )
    };
    let registry = Registry::start(with_tls, &["--dest-cert-dir=DIR/trusted"]);
    let mut settings = registry.settings();
    let e = client(settings.clone()).manifest(&tag()).unwrap_err();
    assert_eq!(e.kind(), Kind::RegistryUntrusted, "{e:?}");
    assert!(e.hint_text().unwrap().contains("update-ca-certificates"));
    let ca = registry.dir.path().join("trusted/ca.crt");
    settings.authorities = std::fs::read_to_string(ca).unwrap();
    pull(settings.clone());
    // The certificate is not for this name.
    let port = registry.name.rsplit(':').next().unwrap();
    settings.repository.registry = format!("127.0.0.1:{port}");
    fails(client(settings).manifest(&tag()), Kind::RegistryUntrusted);
}

#[test]
fn layer_is_read_in_parallel_by_clones() {
    let registry = Registry::start(|_| OPEN.to_owned(), &["--dest-tls-verify=false"]);
    let mut first = client(registry.settings());
    let manifest = first.manifest(&tag()).unwrap();
    let parsed: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap();
    let layer = &parsed["layers"][0];
    let digest = layer["digest"].as_str().unwrap().to_owned();
    let size = layer["size"].as_u64().unwrap();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (client, digest) = (first.clone(), digest.clone());
            crate::host::thread::spawn("layer", move || {
                let mut bytes = Vec::new();
                let mut blob = client.blob(&digest, size, 0).unwrap();
                blob.read_to_end(&mut bytes).unwrap();
                sha256(&bytes)
            })
            .unwrap()
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), digest);
    }
}
