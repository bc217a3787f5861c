//! The handshake phase: the only part of a client's conversation that is read. proto.md, "Newstyle
//! negotiation":
//!
//! ```text
//!   client                      front                        private server
//!     <- NBDMAGIC IHAVEOPT flags
//!   flags ->
//!   NBD_OPT_STARTTLS ->         (first of all, where TLS is demanded)
//!     <- ACK; TLS handshake
//!                               connects                     -> greeting
//!   NBD_OPT_LIST ->             answers with public names
//!   NBD_OPT_GO, INFO,           public name becomes private  -> answers
//!   *_META_CONTEXT  ->          or NBD_REP_ERR_UNKNOWN
//!     <-                        NBD_INFO_NAME becomes public <- answers
//!   STRUCTURED_REPLY,
//!   EXTENDED_HEADERS ->         as it is                     -> answers
//!   any other ->                NBD_REP_ERR_UNSUP
//! ```
//!
//! What the client is granted is granted by the private server, so nothing has to be remembered
//! here: after `NBD_OPT_GO` both sides are already in agreement on all that follows. An option that
//! we do not know never gets there: it might name an export in a way that we do not know either.

use std::os::unix::net::UnixStream;

use super::super::socket::{Deadline, Socket};
use super::super::wire;
use super::Site;
use super::channel::{End, Stream};
use super::names::Export;

/// The longest data of an option, and of a reply to one: room for a name, and for the names of
/// some contexts, of 4096 bytes each.
const MAX_DATA: u32 = 64 * 1024;

/// What both greetings say. The private server must offer no less, since its answers are passed on
/// as they are.
const FLAGS: u16 = wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES;

/// Leads the handshake to its end: both streams, ready for transmission, or nothing if the client
/// had all it wanted.
pub(super) fn negotiate(
    client: Stream,
    site: &Site,
    deadline: Deadline,
) -> Result<Option<(Stream, Stream)>, End> {
    let mut client = Client {
        stream: client,
        site,
        deadline,
    };
    let flags = client.greet()?;
    let client = match &site.psk {
        None => Some(client),
        Some(_) => client.secure()?,
    };
    let Some(client) = client else {
        return Ok(None);
    };
    let upstream = connect(site, flags, deadline)?;
    Mediator { client, upstream }.serve()
}

/// The side towards the client.
struct Client<'a> {
    stream: Stream,
    site: &'a Site,
    deadline: Deadline,
}

impl Client<'_> {
    /// The answer is the client's flags.
    fn greet(&mut self) -> Result<u32, End> {
        let mut greeting = Vec::with_capacity(18);
        greeting.extend(wire::MAGIC.to_be_bytes());
        greeting.extend(wire::OPTION_MAGIC.to_be_bytes());
        greeting.extend(FLAGS.to_be_bytes());
        self.send(&greeting)?;
        let mut flags = [0; 4];
        self.receive(&mut flags)?;
        let flags = u32::from_be_bytes(flags);
        // "Client flags": a server must drop a client that sets what it does not know.
        if flags & !u32::from(FLAGS) != 0 {
            return Err(End::protocol(format!("client flags {flags:#x}")));
        }
        Ok(flags)
    }

    /// Forced TLS ("TLS versions", "FORCEDTLS mode"): nothing is told before it. Options are read
    /// to the byte, so nothing that was sent in the clear is left over for what follows.
    fn secure(mut self) -> Result<Option<Self>, End> {
        loop {
            let (option, data) = self.option()?;
            match option {
                wire::OPT_STARTTLS if data.is_empty() => break,
                wire::OPT_STARTTLS => self.refuse(option, wire::REP_ERR_INVALID)?,
                wire::OPT_ABORT => return self.goodbye().map(|()| None),
                // It has no error reply.
                wire::OPT_EXPORT_NAME => return Err(End::protocol("an export without TLS")),
                _ => self.refuse(option, wire::REP_ERR_TLS_REQD)?,
            }
        }
        self.reply(wire::OPT_STARTTLS, wire::REP_ACK, &[])?;
        let (Stream::Tcp(stream), Some(psk)) = (self.stream, &self.site.psk) else {
            return Err(End::Tls("only on TCP".to_owned()));
        };
        let stream = psk.accept(stream, &self.site.bell, self.deadline)?;
        Ok(Some(Self { stream, ..self }))
    }

    /// The next option and its data. A longer one than any that makes sense ends the connection.
    fn option(&mut self) -> Result<(u32, Vec<u8>), End> {
        let mut header = [0; 16];
        self.receive(&mut header)?;
        let mut at = wire::Cursor(&header);
        if at.u64()? != wire::OPTION_MAGIC {
            return Err(End::protocol("not an option"));
        }
        let (option, length) = (at.u32()?, at.u32()?);
        if length > MAX_DATA {
            let name = wire::option_name(option);
            return Err(End::protocol(format!("{name} of {length} bytes")));
        }
        let mut data = vec![0; length as usize];
        self.receive(&mut data)?;
        Ok((option, data))
    }

    fn list(&mut self, data: &[u8]) -> Result<(), End> {
        if !data.is_empty() {
            return self.refuse(wire::OPT_LIST, wire::REP_ERR_INVALID);
        }
        for name in self.site.names.public() {
            let mut item = Vec::new();
            wire::put_string(&mut item, name);
            self.reply(wire::OPT_LIST, wire::REP_SERVER, &item)?;
        }
        self.reply(wire::OPT_LIST, wire::REP_ACK, &[])
    }

    /// After `NBD_OPT_ABORT`: the client may be gone already.
    fn goodbye(&mut self) -> Result<(), End> {
        let _ = self.reply(wire::OPT_ABORT, wire::REP_ACK, &[]);
        self.stream.finish();
        Ok(())
    }

    fn refuse(&mut self, option: u32, error: u32) -> Result<(), End> {
        self.reply(option, error, &[])
    }

    fn reply(&mut self, option: u32, reply: u32, data: &[u8]) -> Result<(), End> {
        self.send(&wire::option_reply(option, reply, data))
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.stream.send(bytes, &self.site.bell, self.deadline)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<(), End> {
        self.stream.receive(buffer, &self.site.bell, self.deadline)
    }
}

/// Reaches the private server and greets it with the client's flags.
fn connect(site: &Site, flags: u32, deadline: Deadline) -> Result<Stream, End> {
    let socket = Socket::connect(&site.upstream, deadline, || !site.bell.has_rung())?;
    let fd = socket.into_fd().ok_or(End::Stopped)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(true)?;
    let mut stream = Stream::Unix(stream);
    let mut greeting = [0; 18];
    stream.receive(&mut greeting, &site.bell, deadline)?;
    let mut at = wire::Cursor(&greeting);
    if at.u64()? != wire::MAGIC || at.u64()? != wire::OPTION_MAGIC || at.u16()? & FLAGS != FLAGS {
        return Err(End::protocol("the private server is not a newstyle one"));
    }
    stream.send(&flags.to_be_bytes(), &site.bell, deadline)?;
    Ok(stream)
}

/// Between the client and the private server.
struct Mediator<'a> {
    client: Client<'a>,
    upstream: Stream,
}

impl Mediator<'_> {
    fn serve(mut self) -> Result<Option<(Stream, Stream)>, End> {
        let site = self.client.site;
        loop {
            let (option, data) = self.client.option()?;
            match option {
                wire::OPT_EXPORT_NAME => {
                    // It has no error reply: the connection ends.
                    let export = site.names.find(&data).ok_or(End::UnknownExport)?;
                    self.ask(option, export.private.as_bytes())?;
                    break;
                }
                wire::OPT_GO => {
                    if self.mediate(option, &data)? {
                        break;
                    }
                }
                wire::OPT_INFO | wire::OPT_LIST_META_CONTEXT | wire::OPT_SET_META_CONTEXT => {
                    self.mediate(option, &data)?;
                }
                wire::OPT_STRUCTURED_REPLY | wire::OPT_EXTENDED_HEADERS => {
                    self.pass(option, &data, None)?;
                }
                wire::OPT_LIST => self.client.list(&data)?,
                wire::OPT_ABORT => return self.client.goodbye().map(|()| None),
                wire::OPT_STARTTLS => {
                    // A second time, or where there are no keys.
                    let error = match site.psk {
                        Some(_) => wire::REP_ERR_INVALID,
                        None => wire::REP_ERR_POLICY,
                    };
                    self.client.refuse(option, error)?;
                }
                _ => self.client.refuse(option, wire::REP_ERR_UNSUP)?,
            }
        }
        Ok(Some((self.client.stream, self.upstream)))
    }

    /// An option that begins with the name of an export. The answer is whether it was granted.
    fn mediate(&mut self, option: u32, data: &[u8]) -> Result<bool, End> {
        let mut at = wire::Cursor(data);
        let name = at.u32().and_then(|length| at.bytes(length as usize));
        let Ok(name) = name else {
            self.client.refuse(option, wire::REP_ERR_INVALID)?;
            return Ok(false);
        };
        let Some(export) = self.client.site.names.find(name) else {
            log::info!("NBD client: {}", End::UnknownExport);
            self.client.refuse(option, wire::REP_ERR_UNKNOWN)?;
            return Ok(false);
        };
        let mut translated = Vec::with_capacity(data.len());
        wire::put_string(&mut translated, &export.private);
        translated.extend(at.0);
        self.pass(option, &translated, Some(export))
    }

    /// Asks the private server and passes its replies on, up to the last. The answer is whether
    /// that is its consent.
    fn pass(&mut self, option: u32, data: &[u8], export: Option<&Export>) -> Result<bool, End> {
        self.ask(option, data)?;
        loop {
            let (reply, data) = self.answer(option)?;
            let data = match export {
                Some(export) => published(reply, data, export),
                None => data,
            };
            self.client.reply(option, reply, &data)?;
            if reply == wire::REP_ACK || reply & wire::REP_ERR != 0 {
                return Ok(reply == wire::REP_ACK);
            }
        }
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> Result<(), End> {
        let Client { site, deadline, .. } = self.client;
        let message = wire::option(option, data);
        self.upstream.send(&message, &site.bell, deadline)
    }

    fn answer(&mut self, option: u32) -> Result<(u32, Vec<u8>), End> {
        let Client { site, deadline, .. } = self.client;
        let mut header = [0; 20];
        self.upstream.receive(&mut header, &site.bell, deadline)?;
        let mut at = wire::Cursor(&header);
        let (magic, about) = (at.u64()?, at.u32()?);
        let (reply, length) = (at.u32()?, at.u32()?);
        if magic != wire::OPTION_REPLY_MAGIC || about != option || length > MAX_DATA {
            return Err(End::protocol("the private server answers otherwise"));
        }
        let mut data = vec![0; length as usize];
        self.upstream.receive(&mut data, &site.bell, deadline)?;
        Ok((reply, data))
    }
}

/// A reply's data as the client may see it: without the private name.
fn published(reply: u32, data: Vec<u8>, export: &Export) -> Vec<u8> {
    if reply == wire::REP_INFO && data.starts_with(&wire::INFO_NAME.to_be_bytes()) {
        let mut name = wire::INFO_NAME.to_be_bytes().to_vec();
        name.extend(export.public.as_bytes());
        return name;
    }
    let tells = String::from_utf8_lossy(&data).contains(&export.private);
    if reply & wire::REP_ERR != 0 && tells {
        return Vec::new(); // the error's text; its type says enough
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_private_name_stays_private() {
        let export = Export {
            public: "vda".to_owned(),
            private: "fl-7-vda".to_owned(),
        };
        let shown = |reply, data: &[u8]| published(reply, data.to_vec(), &export);
        assert_eq!(shown(wire::REP_INFO, b"\0\x01fl-7-vda"), b"\0\x01vda");
        assert_eq!(shown(wire::REP_INFO, b"\0\0size"), b"\0\0size");
        let unknown = wire::REP_ERR_UNKNOWN;
        assert_eq!(shown(unknown, b"export 'fl-7-vda' not present"), b"");
        assert_eq!(shown(unknown, b"not now"), b"not now");
    }
}
