//! Tests of pulls through a proxy.

use super::*;

fn through(fake: &Fake, change: impl FnOnce(&mut Settings)) -> Result<Manifest> {
    let mut client = client_by_name(fake, |settings| {
        settings.proxies.http = Some(Secret::new("http://bob:canary@proxy.example:3128"));
        settings.proxies.https = settings.proxies.http.clone();
        change(settings);
    });
    client.manifest(&tag())
}

#[test]
fn proxy_makes_a_tunnel() {
    let fake = Fake::start(|_| manifest(b"{}"));
    through(&fake, |_| {}).unwrap();
    let seen = fake.seen();
    let tunnel = seen
        .iter()
        .rfind(|asked| asked.method == "CONNECT")
        .unwrap();
    assert_eq!(tunnel.path, "registry.example:80");
    assert_eq!(
        tunnel.header("proxy-authorization"),
        Some("Basic Ym9iOmNhbmFyeQ==")
    );
    let request = seen.last().unwrap();
    assert_eq!(request.path, "/v2/app/manifests/v1");
    assert_eq!(request.header("proxy-authorization"), None);
}

#[test]
fn excepted_host_is_reached_directly() {
    let fake = Fake::start(|_| manifest(b"{}"));
    through(&fake, |settings| {
        settings.proxies.no_proxy = ".example".into()
    })
    .unwrap();
    assert!(fake.seen().iter().all(|asked| asked.method != "CONNECT"));
}

#[test]
fn refusing_proxies_are_named() {
    for (reply, kind) in [
        ("HTTP/1.1 407 Login\r\n\r\n", Kind::RegistryDenied),
        ("HTTP/1.1 403 No\r\n\r\n", Kind::RegistryUnreachable),
        ("nonsense\r\n\r\n", Kind::RegistryUnreachable),
        ("", Kind::RegistryUnreachable),
    ] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        crate::host::thread::spawn("proxy", move || {
            use std::io::Write;
            // A client that gets no answer tries again, with and without TLS.
            for stream in listener.incoming().take(8) {
                let _ = stream.unwrap().write_all(reply.as_bytes());
            }
        })
        .unwrap();
        let mut settings = settings("registry.example");
        settings.proxies.https = Some(Secret::new("bob:canary@proxy.example"));
        let dial = Arc::new(To(address));
        let cancel = Cancel::try_new().unwrap();
        let mut client = Client::new(settings, dial, cancel).unwrap();
        let text = fails(client.manifest(&tag()), kind);
        assert!(text.contains("use the proxy proxy.example:80"), "{text}");
    }
}
