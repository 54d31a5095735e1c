//! Answers a registry's challenge: chooses the token server and the credential, and parses the
//! server's reply.

use super::address;
use super::challenge::{Bearer, Challenge};
use super::http::{Http, Request};
use super::redirect::check_host;
use super::settings::Settings;
use super::url::{Origin, Scheme, Url, encode, split_authority};
use crate::api::registry::{Credential, Secret};
use crate::error::{Error, Kind, Result};
use crate::host::text::quoted;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

/// Registries that are known to have their token server on another host, with that host. Sources:
/// the distribution project's "Token Authentication Specification", whose example is Docker Hub's
/// challenge, and GitLab's "Container registry administration", where the realm is GitLab's own
/// host with the path `/jwt/auth`.
const TOKEN_SERVERS: [(&str, &str); 2] = [
    ("registry-1.docker.io", "auth.docker.io"),
    ("registry.gitlab.com", "gitlab.com"),
];
/// The size limit of a token server's reply.
const TOKEN_BYTES_MAX: u64 = 256 * 1024;
/// The size limit of the challenge's part of the request for a token.
const PARAMETER_BYTES_MAX: usize = 2048;

/// Returns the hosts that a pull may send credentials to.
pub(super) fn trusted_hosts(settings: &Settings, registry: &str) -> Vec<String> {
    let known = TOKEN_SERVERS.iter().map(|pair| (pair.0, pair.1));
    let configured = settings
        .token_servers
        .iter()
        .map(|server| (server.registry.as_str(), server.host.as_str()));
    let named = settings.repository.registry.as_str();
    let named = split_authority(named).map_or(String::new(), |(host, _)| host);
    known
        .chain(configured)
        .filter(|(of, _)| *of == registry || *of == named)
        .map(|(_, host)| host.to_owned())
        .chain([registry.to_owned()])
        .collect()
}

/// Returns the value of `Authorization` that answers a challenge.
///
/// # Errors
/// `registry_denied`, `registry_invalid` (a token server that is not trusted, an invalid reply),
/// `registry_busy`, `registry_unreachable`, `cancelled`.
pub(super) fn answer(
    http: &Http,
    settings: &Settings,
    registry: &Origin,
    challenge: Option<Challenge>,
) -> Result<Secret> {
    match challenge {
        None => Err(Error::new(
            Kind::Unsupported,
            format!("{registry} asks for an authentication that is neither Basic nor Bearer"),
        )),
        Some(Challenge::Basic) => match &settings.credential {
            Credential::Basic { user, password } => Ok(basic(user, password)),
            Credential::Anonymous | Credential::Identity { .. } => Err(denied(settings)),
        },
        Some(Challenge::Bearer(bearer)) => {
            let realm = realm(&bearer.realm, registry, settings)?;
            let token = fetch(http, settings, &bearer, realm)?;
            Ok(Secret::new(format!("Bearer {}", token.reveal())))
        }
    }
}

/// Returns the error for a registry that refuses access with this credential.
pub(super) fn denied(settings: &Settings) -> Error {
    let repository = &settings.repository;
    let why = match settings.credential {
        Credential::Anonymous => {
            format!(
                "{repository} does not exist, or {} requires a login",
                repository.registry
            )
        }
        _ => format!(
            "{} refuses the credentials for {repository}",
            repository.registry
        ),
    };
    Error::new(Kind::RegistryDenied, why).hint(format!("fcctl login {}", repository.registry))
}

fn basic(user: &str, password: &Secret) -> Secret {
    let pair = format!("{user}:{}", password.reveal());
    Secret::new(format!("Basic {}", BASE64_STANDARD.encode(pair)))
}

/// Checks the token server that a challenge names. Only a trusted host may get a credential, and a
/// registry must not make fcd talk to this host's own services.
pub(super) fn realm(text: &str, registry: &Origin, settings: &Settings) -> Result<Url> {
    let refused = |why: &str| {
        Error::new(
            Kind::RegistryInvalid,
            format!(
                "{registry} names the token server {}, which {why}",
                quoted(text)
            ),
        )
    };
    let url = Url::parse(text).map_err(|why| refused("is not usable").with_source(why))?;
    let is_local = address::is_loopback(&registry.host) && address::is_loopback(url.host());
    let is_trusted = trusted_hosts(settings, &registry.host)
        .iter()
        .any(|host| host == url.host());
    // Without a credential, there is nothing that a token server could learn, and many registries
    // have their token server on another host.
    let is_anonymous = matches!(settings.credential, Credential::Anonymous);
    if !is_trusted && !is_local && !is_anonymous {
        return Err(refused("is on another host").hint(format!(
            "if it may have your credential, ask root to add it to fcd's configuration: \
             registry.token_servers = [\"{}={}\"]",
            registry.host,
            url.host()
        )));
    }
    // An insecure registry may have its token server on its own host.
    let same_host = registry.scheme == Scheme::Http && registry.host == url.host();
    if url.origin.scheme == Scheme::Http && !is_local && !same_host {
        return Err(refused("does not use TLS"));
    }
    check_host(&url, is_local || is_trusted)
        .map_err(|_| refused("has an address that no registry may use"))?;
    Ok(url)
}

/// Requests a token from the token server.
fn fetch(http: &Http, settings: &Settings, bearer: &Bearer, realm: Url) -> Result<Secret> {
    let origin = realm.origin.clone();
    let request = request(settings, bearer, realm)?;
    let reply = http.send(&request)?;
    let failed = |kind, status: u16, message: Option<String>| {
        let message = message.map_or(String::new(), |message| format!(": {message}"));
        let why = format!("the token server {origin} answers {status}{message}");
        Error::new(kind, why)
    };
    match reply.status {
        200 => parse_token(&reply.read_all(TOKEN_BYTES_MAX)?).ok_or_else(|| {
            let why = format!("the token server {origin} sends no token");
            Error::new(Kind::RegistryInvalid, why)
        }),
        401 | 403 => Err(denied(settings)),
        status @ (429 | 500..=599) => Err(failed(Kind::RegistryBusy, status, reply.into_message())),
        status => Err(failed(Kind::RegistryInvalid, status, reply.into_message())),
    }
}

/// Returns the request for a token: a GET, with the password if there is one, or a POST that
/// exchanges an identity token.
fn request(settings: &Settings, bearer: &Bearer, mut realm: Url) -> Result<Request> {
    // Request our own scope, as docker does. A scope that the registry chooses could include more
    // rights, and the registry gets the token.
    let scope = format!("repository:{}:pull", settings.repository.path());
    let service = bearer.service.as_deref().unwrap_or_default();
    if scope.len() + service.len() > PARAMETER_BYTES_MAX {
        let why = format!(
            "the challenge of {} is too long",
            settings.repository.registry
        );
        return Err(Error::new(Kind::RegistryInvalid, why));
    }
    if let Credential::Identity { token } = &settings.credential {
        let mut form = String::from("grant_type=refresh_token&client_id=fcd");
        for (name, value) in [
            ("service", service),
            ("scope", &scope),
            ("refresh_token", token.reveal()),
        ] {
            form += &format!("&{name}=");
            encode(&mut form, value);
        }
        let mut request = Request::get(realm, "application/json");
        request.form = Some(Secret::new(form));
        return Ok(request);
    }
    if !service.is_empty() {
        realm.add_query("service", service);
    }
    realm.add_query("scope", &scope);
    let mut request = Request::get(realm, "application/json");
    if let Credential::Basic { user, password } = &settings.credential {
        request.authorization = Some(basic(user, password));
    }
    Ok(request)
}

#[derive(Deserialize)]
struct TokenReply {
    token: Option<Secret>,
    access_token: Option<Secret>,
}

/// Reads the reply of a token server.
pub(super) fn parse_token(bytes: &[u8]) -> Option<Secret> {
    let reply: TokenReply = serde_json::from_slice(bytes).ok()?;
    let token = reply.token.or(reply.access_token)?;
    let is_token = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    is_token(token.reveal()).then_some(token)
}

#[cfg(test)]
mod unit {
    use super::super::settings::{Repository, TokenServer};
    use super::*;

    fn settings(registry: &str) -> Settings {
        Settings::new(Repository {
            registry: registry.into(),
            name: "library/gcc".into(),
        })
    }

    fn origin(url: &str) -> Origin {
        Url::parse(url).unwrap().origin
    }

    fn login() -> Credential {
        Credential::Basic {
            user: "ann".into(),
            password: Secret::new("pw"),
        }
    }

    #[track_caller]
    fn check(registry: &str, text: &str, trusted: bool) {
        let mut settings = settings(&origin(registry).host);
        settings.credential = login();
        check_with(&settings, registry, text, trusted);
    }

    #[track_caller]
    fn check_with(settings: &Settings, registry: &str, text: &str, trusted: bool) {
        let checked = realm(text, &origin(registry), settings);
        match checked {
            Ok(_) => assert!(trusted, "{text}"),
            Err(e) => {
                assert!(!trusted, "{e}");
                assert_eq!(e.kind(), Kind::RegistryInvalid);
            }
        }
    }

    #[test]
    fn realm_is_on_the_registrys_host_or_well_known() {
        check(
            "https://registry-1.docker.io/",
            "https://auth.docker.io/token",
            true,
        );
        check(
            "https://registry.gitlab.com/",
            "https://gitlab.com/jwt/auth",
            true,
        );
        check("https://ghcr.io/", "https://ghcr.io/token", true);
        check("https://r:5000/", "https://r:5001/token", true);
        check(
            "http://localhost:5000/",
            "http://127.0.0.1:5001/token",
            true,
        );
        check("http://insecure/", "http://insecure:81/token", true);
        for realm in [
            "https://auth.docker.io/token",
            "https://evil/token",
            "http://r/token",
            "https://sub.r/token",
            "https://r.evil/token",
            "https://user@r/token",
            "https://169.254.169.254/latest",
            "http://169.254.169.254/latest",
            "https://127.0.0.1/token",
            "http://localhost/token",
            "/token",
            "",
        ] {
            check("https://r/", realm, false);
        }
        check(
            "http://localhost:5000/",
            "http://169.254.169.254/token",
            false,
        );
        check("http://insecure/", "http://other/token", false);
        check(
            "https://169.254.169.254/",
            "https://169.254.169.254/token",
            false,
        );
    }

    #[test]
    fn anonymous_token_may_come_from_any_ordinary_host() {
        let check = |registry: &str, realm: &str, allowed| {
            let settings = settings(&origin(registry).host);
            check_with(&settings, registry, realm, allowed);
        };
        for realm in [
            "https://ghcr.io/token",
            "https://gitlab.corp/jwt/auth",
            "https://10.0.0.1/token",
            "https://localhost.corp/token",
        ] {
            check("https://lscr.io/", realm, true);
        }
        for realm in [
            "http://ghcr.io/token",
            "https://user@ghcr.io/token",
            "https://169.254.169.254/latest",
            "https://127.0.0.1/token",
            "https://localhost/token",
            "https://[::1]/token",
            "https://[fd00:ec2::254]/latest",
            "https://0/token",
            "/token",
        ] {
            check("https://lscr.io/", realm, false);
        }
        check("http://insecure/", "http://other/token", false);
    }

    #[test]
    fn refused_token_server_is_named_in_setting() {
        let mut settings = settings("registry.corp");
        settings.credential = login();
        let registry = origin("https://registry.corp:5000/");
        let e = realm("https://login.corp/t", &registry, &settings).unwrap_err();
        let hint = e.hint_text().unwrap();
        let setting = "registry.token_servers = [\"registry.corp=login.corp\"]";
        assert!(hint.contains(setting), "{hint}");
    }

    #[test]
    fn configured_token_server_is_trusted_for_its_registry_only() {
        let mut settings = settings("r");
        settings.credential = login();
        settings.token_servers = vec![TokenServer {
            registry: "r".into(),
            host: "login.corp".into(),
        }];
        assert!(realm("https://login.corp/t", &origin("https://r/"), &settings).is_ok());
        settings.repository.registry = "other".into();
        assert!(realm("https://login.corp/t", &origin("https://other/"), &settings).is_err());
    }

    #[test]
    fn request_has_scope_service_and_credential() {
        let bearer = Bearer {
            realm: String::new(),
            service: Some("s".into()),
        };
        let url = || Url::parse("https://r/token?x=1").unwrap();
        let mut settings = settings("docker.io");
        let anonymous = request(&settings, &bearer, url()).unwrap();
        assert!(anonymous.authorization.is_none());
        assert_eq!(
            anonymous.url.to_request(),
            "https://r/token?x=1&service=s&scope=repository%3Alibrary%2Fgcc%3Apull"
        );
        settings.credential = Credential::Basic {
            user: "ann".into(),
            password: Secret::new("pw"),
        };
        let basic = request(&settings, &bearer, url()).unwrap();
        assert_eq!(basic.authorization.unwrap().reveal(), "Basic YW5uOnB3");
        settings.credential = Credential::Identity {
            token: Secret::new("a&b"),
        };
        let identity = request(&settings, &bearer, url()).unwrap();
        assert!(identity.authorization.is_none());
        assert_eq!(
            identity.form.unwrap().reveal(),
            "grant_type=refresh_token&client_id=fcd&service=s\
             &scope=repository%3Alibrary%2Fgcc%3Apull&refresh_token=a%26b"
        );
    }

    #[test]
    fn token_is_one_of_two_members() {
        let token = |text: &str| parse_token(text.as_bytes()).map(|t| t.reveal().to_owned());
        assert_eq!(token(r#"{"token":"a","access_token":"b"}"#).unwrap(), "a");
        assert_eq!(
            token(r#"{"access_token":"b","expires_in":60}"#).unwrap(),
            "b"
        );
        for text in [
            "",
            "{}",
            r#"{"token":""}"#,
            r#"{"token":"a\r\nX: y"}"#,
            r#"{"token":1}"#,
        ] {
            assert_eq!(token(text), None, "{text}");
        }
    }
}
