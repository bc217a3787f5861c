//! The handshake: from a fresh socket to an export that answers commands.
//!
//! Fixed newstyle only, which every server since 2011 speaks. proto.md, "Newstyle negotiation":
//!
//! ```text
//!   server: NBDMAGIC IHAVEOPT flags     client: flags
//!   NBD_OPT_STRUCTURED_REPLY            only if metadata contexts are wanted
//!   NBD_OPT_SET_META_CONTEXT            likewise
//!   NBD_OPT_GO                          or NBD_OPT_EXPORT_NAME, if the server does not know GO
//! ```
//!
//! `NBD_INFO_BLOCK_SIZE` is deliberately not asked for: asking is a promise to align every request
//! to the server's minimum ("Block size constraints"). Without the promise QEMU serves single
//! bytes of any image, and tells its maximum nevertheless, which is honoured.

use super::socket::{Deadline, Socket};
use super::{Fault, wire};

/// The largest request where the server names no maximum ("Block size constraints").
const DEFAULT_MAX_REQUEST: u32 = 32 << 20;

/// The longest option reply that is read: a context's id and name, or an error's text, is shorter.
const MAX_OPTION_REPLY: u32 = 8192;

/// What the server granted.
#[derive(Debug)]
pub(super) struct Granted {
    /// Size of the export in bytes.
    pub(super) size: u64,
    /// The longest read in bytes.
    pub(super) max_request: u32,
    /// The ids of the wanted metadata contexts, in the order in which they were wanted.
    pub(super) contexts: Vec<u32>,
}

/// Leads the handshake to its end.
pub(super) fn negotiate(
    socket: &mut Socket,
    export: &str,
    contexts: &[&str],
    deadline: Deadline,
) -> Result<Granted, Fault> {
    let mut talk = Handshake {
        socket,
        deadline,
        zeroes: true,
    };
    talk.greet()?;
    let contexts = if contexts.is_empty() {
        Vec::new()
    } else {
        talk.structured_replies()?;
        talk.meta_contexts(export, contexts)?
    };
    let (size, max_request) = match talk.go(export) {
        Err(Fault::Refused { reply, .. }) if reply == wire::REP_ERR_UNSUP => {
            (talk.export_name(export)?, DEFAULT_MAX_REQUEST)
        }
        other => other?,
    };
    // "Terminology and conventions" has offsets as signed 64-bit numbers; it also keeps every
    // `offset + length` below from overflowing.
    if i64::try_from(size).is_err() {
        return Err(Fault::protocol(format!("an export of {size} bytes")));
    }
    Ok(Granted {
        size,
        max_request,
        contexts,
    })
}

struct Handshake<'a> {
    socket: &'a mut Socket,
    deadline: Deadline,
    /// The server pads its answer to `NBD_OPT_EXPORT_NAME`.
    zeroes: bool,
}

impl Handshake<'_> {
    fn greet(&mut self) -> Result<(), Fault> {
        let mut greeting = [0; 18];
        self.receive(&mut greeting)?;
        let mut at = wire::Cursor(&greeting);
        if at.u64()? != wire::MAGIC || at.u64()? != wire::OPTION_MAGIC {
            return Err(Fault::protocol("not a newstyle NBD server"));
        }
        let offered = at.u16()?;
        if offered & wire::FLAG_FIXED_NEWSTYLE == 0 {
            return Err(Fault::protocol("not a fixed newstyle NBD server"));
        }
        // "Client flags": only what the server offered may be set.
        let flags = offered & (wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
        self.zeroes = flags & wire::FLAG_NO_ZEROES == 0;
        self.send(&u32::from(flags).to_be_bytes())
    }

    fn structured_replies(&mut self) -> Result<(), Fault> {
        self.option(wire::OPT_STRUCTURED_REPLY, &[])?;
        match self.option_reply(wire::OPT_STRUCTURED_REPLY)?.0 {
            wire::REP_ACK => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    fn meta_contexts(&mut self, export: &str, wanted: &[&str]) -> Result<Vec<u32>, Fault> {
        let mut data = Vec::new();
        wire::put_string(&mut data, export);
        data.extend((wanted.len() as u32).to_be_bytes());
        for name in wanted {
            wire::put_string(&mut data, name);
        }
        self.option(wire::OPT_SET_META_CONTEXT, &data)?;

        let mut ids = vec![None; wanted.len()];
        loop {
            let (kind, data) = self.option_reply(wire::OPT_SET_META_CONTEXT)?;
            match kind {
                wire::REP_META_CONTEXT => {
                    let mut at = wire::Cursor(&data);
                    let id = at.u32()?;
                    if ids.contains(&Some(id)) {
                        return Err(Fault::protocol(format!("context id {id} twice")));
                    }
                    // A context that was not wanted is never asked about; its chunks would be
                    // refused there.
                    for (slot, name) in ids.iter_mut().zip(wanted) {
                        if name.as_bytes() == at.0 {
                            *slot = Some(id);
                        }
                    }
                }
                wire::REP_ACK => break,
                other => return Err(unexpected(other)),
            }
        }
        // Servers leave out what they do not have, without an error.
        ids.iter()
            .zip(wanted)
            .map(|(id, name)| {
                id.ok_or_else(|| Fault::Refused {
                    option: wire::OPT_SET_META_CONTEXT,
                    reply: wire::REP_ERR_UNKNOWN,
                    message: format!("no context {name}"),
                })
            })
            .collect()
    }

    /// Size of the export and longest request.
    fn go(&mut self, export: &str) -> Result<(u64, u32), Fault> {
        let mut data = Vec::new();
        wire::put_string(&mut data, export);
        data.extend(0u16.to_be_bytes()); // no information requests: see the module's comment
        self.option(wire::OPT_GO, &data)?;

        let (mut size, mut max_request) = (None, DEFAULT_MAX_REQUEST);
        loop {
            let (kind, data) = self.option_reply(wire::OPT_GO)?;
            match kind {
                wire::REP_INFO => {
                    let mut at = wire::Cursor(&data);
                    match at.u16()? {
                        wire::INFO_EXPORT => size = Some(at.u64()?),
                        wire::INFO_BLOCK_SIZE => {
                            let (_minimum, _preferred) = (at.u32()?, at.u32()?);
                            max_request = at.u32()?.min(DEFAULT_MAX_REQUEST);
                        }
                        _ => {} // "Clients MUST ignore" what they do not know
                    }
                }
                wire::REP_ACK => break,
                other => return Err(unexpected(other)),
            }
        }
        if max_request == 0 {
            return Err(Fault::protocol("a maximum block size of 0"));
        }
        size.map(|size| (size, max_request))
            .ok_or_else(|| Fault::protocol("no size of the export"))
    }

    /// The old way, without an error reply: a server that does not know the export hangs up.
    fn export_name(&mut self, export: &str) -> Result<u64, Fault> {
        self.option(wire::OPT_EXPORT_NAME, export.as_bytes())?;
        let mut reply = [0; 134];
        let length = if self.zeroes { 134 } else { 10 };
        self.receive(reply.get_mut(..length).unwrap_or_default())?;
        wire::Cursor(&reply).u64()
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<(), Fault> {
        self.send(&wire::option(option, data))
    }

    /// One reply: its type and its data. An error reply is an error.
    fn option_reply(&mut self, option: u32) -> Result<(u32, Vec<u8>), Fault> {
        let mut header = [0; 20];
        self.receive(&mut header)?;
        let mut at = wire::Cursor(&header);
        if at.u64()? != wire::OPTION_REPLY_MAGIC {
            return Err(Fault::protocol("not an option reply"));
        }
        let (about, reply, length) = (at.u32()?, at.u32()?, at.u32()?);
        if about != option {
            let [about, option] = [about, option].map(wire::option_name);
            return Err(Fault::protocol(format!(
                "a reply about {about} instead of {option}"
            )));
        }
        if length > MAX_OPTION_REPLY {
            let text = format!("an option reply of {length} bytes");
            return Err(Fault::protocol(text));
        }
        let mut data = vec![0; length as usize];
        self.receive(&mut data)?;
        if reply & wire::REP_ERR != 0 {
            return Err(Fault::Refused {
                option,
                reply,
                message: wire::text(&data)?,
            });
        }
        Ok((reply, data))
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.socket.send(bytes, self.deadline)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<(), Fault> {
        self.socket.receive(buffer, self.deadline)
    }
}

fn unexpected(reply: u32) -> Fault {
    Fault::protocol(format!("an unexpected option reply of type {reply}"))
}
