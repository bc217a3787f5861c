//! The NBD protocol's numbers and layouts, as pure functions: no socket, no state.
//!
//! Source: `doc/proto.md` of <https://github.com/NetworkBlockDevice/nbd>; comments name its
//! sections. All integers are big-endian.

use super::Fault;

// "Newstyle negotiation" and "Fixed newstyle negotiation"
pub(super) const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(super) const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;

// "Option types"
pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_STARTTLS: u32 = 5;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;
pub(super) const OPT_EXTENDED_HEADERS: u32 = 11;

// "Option reply types"
pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_ERR | 1;
pub(super) const REP_ERR_POLICY: u32 = REP_ERR | 2;
pub(super) const REP_ERR_INVALID: u32 = REP_ERR | 3;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_ERR | 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERR | 6;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

// "Request types"
pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

// "Structured reply flags" and "Structured reply types"
const CHUNK_DONE: u16 = 1 << 0;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_BLOCK_STATUS: u16 = 5;
/// Set in the type of every error chunk, known or not; all begin alike.
pub(super) const CHUNK_ERROR: u16 = 1 << 15;

/// "Terminology and conventions": a string has at most 4096 bytes.
pub(super) const MAX_STRING: usize = 4096;

/// Length of a request, and of what is common to the headers of both sorts of reply.
pub(super) const REQUEST_LENGTH: usize = 28;
pub(super) const REPLY_LENGTH: usize = 16;

/// "Request message". No command here has flags.
pub(super) fn request(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_LENGTH] {
    let mut out = [0; REQUEST_LENGTH];
    out[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out[6..8].copy_from_slice(&command.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..24].copy_from_slice(&offset.to_be_bytes());
    out[24..28].copy_from_slice(&length.to_be_bytes());
    out
}

/// "Option haggling": one option with its data.
pub(super) fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + data.len());
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

/// "Option haggling": a server's reply to an option.
pub(super) fn option_reply(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(20 + data.len());
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(reply.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

/// A string with its length before it, as options carry it.
pub(super) fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u32).to_be_bytes());
    out.extend(text.as_bytes());
}

/// The first 16 bytes of a reply.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// "Simple reply message": the whole header; a read's payload follows if `errno` is 0.
    Simple {
        /// 0 is success.
        errno: u32,
    },
    /// "Structured reply chunk message": a 32-bit payload length and the payload follow.
    Chunk {
        /// `NBD_REPLY_TYPE_*`.
        kind: u16,
        /// No chunk of this reply follows.
        done: bool,
    },
}

/// Decodes the common part of a reply to the request that carried `cookie`.
pub(super) fn reply(header: &[u8; REPLY_LENGTH], cookie: u64) -> Result<Reply, Fault> {
    let mut at = Cursor(header);
    let magic = at.u32()?;
    let reply = match magic {
        SIMPLE_REPLY_MAGIC => Reply::Simple { errno: at.u32()? },
        CHUNK_MAGIC => {
            let flags = at.u16()?;
            Reply::Chunk {
                kind: at.u16()?,
                done: flags & CHUNK_DONE != 0,
            }
        }
        _ => {
            return Err(Fault::protocol(format!(
                "a reply begins with {magic:#010x}"
            )));
        }
    };
    // One command is in flight at a time, so any other cookie means that we are out of step.
    match at.u64()? {
        c if c == cookie => Ok(reply),
        c => Err(Fault::protocol(format!(
            "a reply to request {c:#x} instead of {cookie:#x}"
        ))),
    }
}

/// The errno and text of an error chunk's payload. Chunk types not known here are read alike, as
/// "Error types" demands; what follows the text, such as an offset, is left.
pub(super) fn error_chunk(payload: &[u8]) -> Result<Fault, Fault> {
    let mut at = Cursor(payload);
    let errno = at.u32()?;
    let length = usize::from(at.u16()?);
    if errno == 0 {
        return Err(Fault::protocol("an error chunk without an error"));
    }
    Ok(Fault::Server {
        errno,
        message: text(at.bytes(length)?)?,
    })
}

/// A peer's text: no longer than the protocol allows, and never mind its encoding.
pub(super) fn text(bytes: &[u8]) -> Result<String, Fault> {
    if bytes.len() > MAX_STRING {
        let length = bytes.len();
        return Err(Fault::protocol(format!("a text of {length} bytes")));
    }
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// Takes integers off the front of a message; running out is the peer's mistake.
pub(super) struct Cursor<'a>(pub(super) &'a [u8]);

impl<'a> Cursor<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (head, rest) = self.0.split_first_chunk().ok_or_else(too_short)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], Fault> {
        let (head, rest) = self.0.split_at_checked(length).ok_or_else(too_short)?;
        self.0 = rest;
        Ok(head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Fault> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_be_bytes)
    }
}

fn too_short() -> Fault {
    Fault::protocol("a message is shorter than its fields")
}

pub(super) fn option_name(option: u32) -> String {
    let name = match option {
        OPT_EXPORT_NAME => "NBD_OPT_EXPORT_NAME",
        OPT_GO => "NBD_OPT_GO",
        OPT_STRUCTURED_REPLY => "NBD_OPT_STRUCTURED_REPLY",
        OPT_SET_META_CONTEXT => "NBD_OPT_SET_META_CONTEXT",
        _ => return format!("option {option}"),
    };
    name.to_owned()
}

pub(super) fn reply_name(reply: u32) -> String {
    let name = match reply & !REP_ERR {
        1 => "UNSUP",
        2 => "POLICY",
        3 => "INVALID",
        4 => "PLATFORM",
        5 => "TLS_REQD",
        6 => "UNKNOWN",
        7 => "SHUTDOWN",
        8 => "BLOCK_SIZE_REQD",
        9 => "TOO_BIG",
        n => return format!("error {n}"),
    };
    format!("NBD_REP_ERR_{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(magic: u32, middle: [u8; 4], cookie: u64) -> [u8; REPLY_LENGTH] {
        let mut out = [0; REPLY_LENGTH];
        out[0..4].copy_from_slice(&magic.to_be_bytes());
        out[4..8].copy_from_slice(&middle);
        out[8..16].copy_from_slice(&cookie.to_be_bytes());
        out
    }

    #[test]
    fn a_request_is_laid_out_as_the_protocol_says() {
        let bytes = request(
            CMD_BLOCK_STATUS,
            0x1112_1314_1516_1718,
            0x2122_2324_2526_2728,
            0x3132,
        );
        #[rustfmt::skip]
        let expected = [
            0x25, 0x60, 0x95, 0x13, 0, 0, 0, 7,
            0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18,
            0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 0x28, 0, 0, 0x31, 0x32,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn an_option_is_laid_out_as_the_protocol_says() {
        let mut data = Vec::new();
        put_string(&mut data, "ab");
        assert_eq!(
            option(OPT_GO, &data),
            b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\x02ab"
        );
    }

    #[test]
    fn replies_are_told_apart() {
        let simple = header(SIMPLE_REPLY_MAGIC, [0, 0, 0, 5], 7);
        assert_eq!(reply(&simple, 7).unwrap(), Reply::Simple { errno: 5 });
        let chunk = header(CHUNK_MAGIC, [0, 1, 0, 5], 7);
        let expected = Reply::Chunk {
            kind: CHUNK_BLOCK_STATUS,
            done: true,
        };
        assert_eq!(reply(&chunk, 7).unwrap(), expected);
        assert!(matches!(reply(&simple, 8), Err(Fault::Protocol(_))));
        let odd = header(0x2560_9513, [0; 4], 7);
        assert!(matches!(reply(&odd, 7), Err(Fault::Protocol(_))));
    }

    #[test]
    fn an_error_chunk_gives_errno_and_text() {
        let with_offset = b"\0\0\0\x1c\0\x04full\0\0\0\0\0\0\x10\0";
        match error_chunk(with_offset).unwrap() {
            Fault::Server { errno, message } => assert_eq!((errno, &*message), (28, "full")),
            other => panic!("{other}"),
        }
        for bad in [&b"\0\0\0\x1c\0\x05full"[..], b"\0\0\0\0\0\0", b"\0\0\0"] {
            assert!(matches!(error_chunk(bad), Err(Fault::Protocol(_))));
        }
        let mut long = b"\0\0\0\x05\x10\x01".to_vec();
        long.resize(6 + MAX_STRING + 1, b'x');
        assert!(matches!(error_chunk(&long), Err(Fault::Protocol(_))));
    }
}
