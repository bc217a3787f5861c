//! TLS with pre-shared keys: the key file, and the server's side of the TLS handshake.
//!
//! OpenSSL does it, because no Rust library does: rustls has no external pre-shared keys
//! (rustls/rustls#174), and what else there is speaks TLS 1.3 only. There are no certificates
//! anywhere here, so a client without a key has nothing to fall back to: the handshake fails.
//!
//! - TLS 1.3: OpenSSL ties a key from this callback to SHA-256, as GnuTLS does.
//! - TLS 1.2: with an ephemeral exchange where the client can, so that a key that leaks later does
//!   not open what was recorded before.
//! - No session tickets: they would let a client in after its key was taken out of the file, and
//!   clients that hang up at once would be sent what they no longer read.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Read;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use openssl::bn::BigNum;
use openssl::dh::Dh;
use openssl::error::ErrorStack;
use openssl::ssl::{
    Ssl, SslContext, SslContextBuilder, SslMethod, SslMode, SslOptions, SslSessionCacheMode,
    SslStream, SslVersion,
};

use super::super::socket::Deadline;
use super::channel::{Bell, End, Stream, wants};
use super::error::FrontError;

/// TLS 1.2, best first, except that curves come second: OpenSSL 3.0 would choose them for a client
/// that has none, and then fail, even if there was another way.
const CIPHERS: &str = "kDHEPSK+AESGCM:kDHEPSK+CHACHA20:kECDHEPSK+CHACHA20:kPSK+AESGCM";
/// TLS 1.3: those with SHA-256.
const SUITES: &str = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";

/// The longest key: what OpenSSL gives room for.
const MAX_KEY: usize = 256;
/// A key file is text of some lines; nothing longer is read.
const MAX_FILE: u64 = 1 << 20;

/// The keys of a file such as psktool makes: `user:hexadecimal key` in each line, which is also
/// what QEMU's `keys.psk` and libnbd's `tls-psk-file` are.
#[derive(Clone)]
pub struct Psk {
    context: SslContext,
}

impl std::fmt::Debug for Psk {
    /// Without the keys: this ends up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Psk")
    }
}

impl Psk {
    /// Reads a key file, which only its owner may read.
    pub fn load(path: &Path) -> Result<Self, FrontError> {
        let wrong = |why: String| FrontError::Keys {
            path: path.to_owned(),
            why,
        };
        let open = || -> std::io::Result<_> {
            let mut options = OpenOptions::new();
            // A named pipe without a writer would keep us waiting.
            let file = options
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)?;
            let meta = file.metadata()?;
            Ok((file, meta))
        };
        let (file, meta) = open().map_err(|e| wrong(e.to_string()))?;
        if !meta.is_file() {
            return Err(wrong("it is not a regular file".to_owned()));
        }
        if meta.mode() & 0o077 != 0 {
            return Err(wrong(format!(
                "others than its owner have access to it (mode {:04o}); chmod it to 0600",
                meta.mode() & 0o7777
            )));
        }
        let mut text = String::new();
        file.take(MAX_FILE)
            .read_to_string(&mut text)
            .map_err(|e| wrong(e.to_string()))?;
        let keys = parse(&text).map_err(wrong)?;
        let context = context(keys).map_err(|e| wrong(format!("OpenSSL: {e}")))?;
        Ok(Self { context })
    }

    /// The server's side of the handshake.
    pub(super) fn accept(
        &self,
        stream: TcpStream,
        bell: &Bell,
        deadline: Deadline,
    ) -> Result<Stream, End> {
        let tls = |e: ErrorStack| End::Tls(e.to_string());
        let ssl = Ssl::new(&self.context).map_err(tls)?;
        let mut stream = SslStream::new(ssl, stream).map_err(tls)?;
        while let Err(error) = stream.accept() {
            let flags = wants(&error).ok_or_else(|| End::Tls(error.to_string()))?;
            bell.wait(&[(stream.get_ref().as_fd(), flags)], Some(deadline))?;
        }
        Ok(Stream::Tls(Box::new(stream)))
    }
}

type Keys = HashMap<Vec<u8>, Vec<u8>>;

/// User and key of each line; the error says what is wrong without showing a key.
fn parse(text: &str) -> Result<Keys, String> {
    let mut keys = Keys::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() {
            continue;
        }
        // A user may have a colon, a key cannot.
        let pair = line.trim_end().rsplit_once(':');
        let (user, key) = pair
            .and_then(|(user, key)| Some((user, unhex(key)?)))
            .filter(|(user, key)| !user.is_empty() && !key.is_empty() && key.len() <= MAX_KEY)
            .ok_or_else(|| {
                format!("line {number} is not user:key, with a key in hexadecimal digits")
            })?;
        if keys.insert(user.as_bytes().to_vec(), key).is_some() {
            return Err(format!("line {number} names a user for the second time"));
        }
    }
    if keys.is_empty() {
        return Err("it holds no key".to_owned());
    }
    Ok(keys)
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let nibble = |c: u8| char::from(c).to_digit(16);
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let pair = |pair: &[u8]| match pair {
        &[high, low] => u8::try_from(nibble(high)? << 4 | nibble(low)?).ok(),
        _ => None,
    };
    digits.chunks(2).map(pair).collect()
}

fn context(keys: Keys) -> Result<SslContext, ErrorStack> {
    let mut context = SslContextBuilder::new(SslMethod::tls_server())?;
    context.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    context.set_options(
        SslOptions::NO_TICKET
            | SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_COMPRESSION
            | SslOptions::CIPHER_SERVER_PREFERENCE,
    );
    context.set_session_cache_mode(SslSessionCacheMode::OFF);
    context.set_num_tickets(0)?;
    context.set_cipher_list(CIPHERS)?;
    context.set_ciphersuites(SUITES)?;
    // A write that had to wait is repeated from a buffer of the same content.
    context.set_mode(SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER);
    let group = Dh::from_pqg(
        BigNum::get_rfc3526_prime_3072()?,
        None,
        BigNum::from_u32(2)?,
    )?;
    context.set_tmp_dh(&group)?;
    let keys = Arc::new(keys);
    context.set_psk_server_callback(move |_, user, room| {
        let key = user.and_then(|user| keys.get(user));
        // A length of 0 says that there is no such user.
        Ok(key.map_or(0, |key| match room.get_mut(..key.len()) {
            Some(room) => {
                room.copy_from_slice(key);
                key.len()
            }
            None => 0,
        }))
    });
    Ok(context.build())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn lines_are_user_and_key() {
        let keys = parse("alice:00fF\n\nbob:x:10\r\n").unwrap();
        assert_eq!(keys.len(), 2);
        assert_eq!(keys[&b"alice"[..]], [0, 255]);
        assert_eq!(keys[&b"bob:x"[..]], [16]);
        let long = format!("a:{}", "00".repeat(MAX_KEY + 1));
        for bad in ["", "a", "a:", ":00", "a:0", "a:0g", "a:+1", "a:é0", &long] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let error = parse("a:00\nb:secret\n").unwrap_err();
        assert!(error.contains("line 2") && !error.contains("secret"));
        assert!(parse("a:00\na:01").is_err());
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.psk");
        std::fs::write(&path, "alice:00ff\n").unwrap();
        for (mode, good) in [(0o644, false), (0o640, false), (0o600, true), (0o400, true)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(Psk::load(&path).is_ok(), good, "{mode:o}");
        }
        let psk = format!("{:?}", Psk::load(&path).unwrap());
        assert!(!psk.contains("ff"));
        let missing = Psk::load(&dir.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("none"), "{missing}");
        assert!(Psk::load(dir.path()).is_err());
    }
}
