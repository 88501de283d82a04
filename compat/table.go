package compat

import (
	"fmt"

	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/engine"
)

type localFunc = func(c *conn, a [][]byte)
type buildFunc = func(c *conn, a [][]byte) (operation, bool)

// locals are the commands that need no engine, or ask it by themselves.
var locals = map[string]localFunc{
	"ping": cmdPing, "echo": cmdEcho, "quit": cmdQuit, "select": cmdSelect, "reset": cmdReset, "hello": cmdHello, "auth": cmdAuth,
	"readonly": cmdReadOnly, "readwrite": cmdReadWrite, "asking": cmdAsking,

	"client|id": cmdClientID, "client|info": cmdClientInfo, "client|list": cmdClientList, "client|kill": cmdClientKill,
	"client|unblock": cmdClientUnblock, "client|setname": cmdClientSetName, "client|getname": cmdClientGetName,
	"client|setinfo": cmdClientSetInfo, "client|no-evict": cmdClientNoEvict, "client|no-touch": cmdClientNoTouch,
	"client|reply": cmdClientReply, "client|capa": cmdClientCapa, "client|tracking": cmdClientTracking,
	"client|trackinginfo": cmdClientTrackingInfo, "client|caching": cmdClientCaching, "client|getredir": cmdClientGetRedir,
	"client|pause": cmdClientPause, "client|unpause": cmdOK,

	"info": cmdInfo, "time": cmdTime, "lastsave": cmdLastSave, "lolwut": cmdLolwut, "role": cmdRole, "wait": cmdWait, "waitaof": cmdWaitAOF,
	"command": cmdCommand, "command|count": cmdCommandCount, "command|info": cmdCommandInfo, "command|docs": cmdCommandDocs,
	"command|list": cmdCommandList, "command|getkeys": cmdCommandGetKeys, "command|getkeysandflags": cmdCommandGetKeysAndFlags,
	"config|get": cmdConfigGet, "config|set": cmdConfigSet, "config|resetstat": cmdOK, "config|rewrite": cmdConfigRewrite,
	"slowlog|get": cmdEmpty, "slowlog|len": cmdZero, "slowlog|reset": cmdOK,
	"latency|doctor": cmdLatencyDoctor, "latency|graph": cmdLatencyGraph, "latency|histogram": cmdEmptyMap, "latency|history": cmdEmpty,
	"latency|latest": cmdEmpty, "latency|reset": cmdLatencyReset,

	"cluster|slots": clustered(cmdClusterSlots), "cluster|shards": clustered(cmdClusterShards), "cluster|nodes": clustered(cmdClusterNodes),
	"cluster|info": clustered(cmdClusterInfo), "cluster|myid": clustered(cmdClusterMyID), "cluster|myshardid": clustered(cmdClusterMyShardID),
	"cluster|keyslot": clustered(cmdClusterKeySlot), "cluster|countkeysinslot": clustered(cmdClusterCountKeys),
	"cluster|getkeysinslot": clustered(cmdClusterGetKeys), "cluster|replicas": clustered(cmdClusterReplicas),
	"cluster|slaves": clustered(cmdClusterReplicas), "cluster|links": clustered(cmdEmpty),
	"cluster|reset": clustered(cmdClusterRefused), "cluster|saveconfig": clustered(cmdOK),

	"acl|cat": cmdACLCat, "acl|deluser": cmdACLDelUser, "acl|dryrun": cmdACLDryRun, "acl|genpass": cmdACLGenPass, "acl|getuser": cmdACLGetUser,
	"acl|list": cmdACLList, "acl|load": cmdACLLoad, "acl|log": cmdACLLog, "acl|save": cmdACLSave, "acl|setuser": cmdACLSetUser,
	"acl|users": cmdACLUsers, "acl|whoami": cmdACLWhoami,

	"multi": cmdMulti, "exec": cmdExec, "discard": cmdDiscard, "watch": cmdWatch, "unwatch": cmdUnwatch,

	"subscribe": subscribe(subChannel), "psubscribe": subscribe(subPattern), "ssubscribe": subscribe(subShard),
	"unsubscribe": unsubscribe(subChannel), "punsubscribe": unsubscribe(subPattern), "sunsubscribe": unsubscribe(subShard),
	"publish": publishCommand(false), "spublish": publishCommand(true),
	"pubsub|channels": pubsubChannels(subChannel), "pubsub|shardchannels": pubsubChannels(subShard),
	"pubsub|numsub": pubsubNumSub(subChannel), "pubsub|shardnumsub": pubsubNumSub(subShard), "pubsub|numpat": cmdPubsubNumPat,

	"keys": cmdKeys,

	"tercet|help": help(tercetHelp...),

	"acl|help": help(
		"CAT [<category>]", "    List all commands that belong to <category>, or all command categories", "    when no category is specified.",
		"DELUSER <username> [<username> ...]", "    Delete a list of users.",
		"DRYRUN <username> <command> [<arg> ...]", "    Returns whether the user can execute the given command without executing the command.",
		"GETUSER <username>", "    Get the user's details.",
		"GENPASS [<bits>]", "    Generate a password.",
		"LIST", "    Show users details in config file format.",
		"LOAD", "    Reload users from the ACL file.",
		"LOG [<count> | RESET]", "    Show the ACL log entries of this node.",
		"SAVE", "    Does nothing: users are durable once set.",
		"SETUSER <username> <attribute> [<attribute> ...]", "    Create or modify a user with the specified attributes.",
		"USERS", "    List all the registered usernames.",
		"WHOAMI", "    Return the current connection username."),
	"client|help": help(
		"CACHING (YES|NO)", "    Enable/disable tracking of the keys for next command in OPTIN/OPTOUT modes.",
		"CAPA <option> [options...]", "    The client claims its some capability options.",
		"GETNAME", "    Return the name of the current connection.",
		"GETREDIR", "    Return the client ID we are redirecting to when tracking is enabled.",
		"ID", "    Return the ID of the current connection.",
		"INFO", "    Return information about the current client connection.",
		"KILL <ip:port>", "    Kill connection made from <ip:port>.",
		"KILL <option> <value> [<option> <value> [...]]", "    Kill connections by ADDR, LADDR, ID, TYPE, USER, MAXAGE, SKIPME.",
		"LIST [options ...]", "    Return information about client connections of this node.",
		"NO-EVICT (ON|OFF)", "    Accepted; clients are not evicted.",
		"NO-TOUCH (ON|OFF)", "    Accepted; access times are not kept.",
		"REPLY (ON|OFF|SKIP)", "    Control the replies sent to the current connection.",
		"SETINFO <option> <value>", "    Set lib-name or lib-ver.",
		"SETNAME <name>", "    Assign the name <name> to the current connection.",
		"TRACKING (ON|OFF) [REDIRECT <id>] [BCAST] [PREFIX <prefix> [...]] [OPTIN] [OPTOUT] [NOLOOP]", "    Control server assisted client side caching.",
		"TRACKINGINFO", "    Report tracking status for the current connection.",
		"UNBLOCK <clientid> [TIMEOUT|ERROR]", "    Unblock the specified blocked client."),
	"command|help": help(
		"(no subcommand)", "    Return details about all commands.",
		"COUNT", "    Return the total number of commands in this server.",
		"LIST", "    Return a list of all commands in this server.",
		"INFO [<command-name> ...]", "    Return details about multiple commands.",
		"DOCS [<command-name> ...]", "    Return documentation details about multiple commands.",
		"GETKEYS <full-command>", "    Return the keys from a full command.",
		"GETKEYSANDFLAGS <full-command>", "    Return the keys and the access flags from a full command."),
	"config|help":  help("GET <pattern>", "    Return parameters matching the glob-like <pattern> and their values.", "RESETSTAT", "    Does nothing."),
	"slowlog|help": help("GET [<count>]", "    Return nothing: see /metrics.", "LEN", "    Return 0.", "RESET", "    Does nothing."),
	"latency|help": help("DOCTOR", "    Say where latency is measured.", "GRAPH <event>", "HISTOGRAM [COMMAND ...]", "HISTORY <event>", "LATEST", "RESET [<event> ...]", "    Answer that nothing was sampled."),
	"memory|help":  help("USAGE <key> [SAMPLES <count>]", "    Return an estimate of what the key costs in memory."),
	"object|help":  help("ENCODING <key>", "    Return the kind of internal representation.", "FREQ <key>", "IDLETIME <key>", "REFCOUNT <key>", "    Answered for compatibility."),
	"pubsub|help": help("CHANNELS [<pattern>]", "    Return the currently active channels matching a <pattern> (default: '*').", "NUMPAT", "    Return number of subscriptions to patterns.",
		"NUMSUB [<channel> ...]", "    Return the number of subscribers for the specified channels.", "SHARDCHANNELS [<pattern>]", "SHARDNUMSUB [<shardchannel> ...]", "    The same for shard channels."),
	"cluster|help": clustered(help("COUNTKEYSINSLOT <slot>", "GETKEYSINSLOT <slot> <count>", "INFO", "KEYSLOT <key>", "LINKS", "MYID", "MYSHARDID", "NODES", "REPLICAS <node-id>", "SHARDS", "SLOTS", "    As in Valkey, for one shard.")),
	"xgroup|help": help(
		"CREATE <key> <groupname> <id|$> [option]", "    Create a new consumer group. Options are:", "    * MKSTREAM", "      Create the empty stream if it does not exist.",
		"    * ENTRIESREAD entries_read", "      Set the group's entries_read counter (internal use).",
		"CREATECONSUMER <key> <groupname> <consumer>", "    Create a new consumer in the specified group.",
		"DELCONSUMER <key> <groupname> <consumer>", "    Remove the specified consumer.",
		"DESTROY <key> <groupname>", "    Remove the specified group.",
		"SETID <key> <groupname> <id|$> [ENTRIESREAD entries_read]", "    Set the current group ID and entries_read counter."),
	"xinfo|help": help(
		"CONSUMERS <key> <groupname>", "    Show consumers of <groupname>.",
		"GROUPS <key>", "    Show the stream consumer groups.",
		"STREAM <key> [FULL [COUNT <count>]", "    Show information about the stream."),
}

// builders are the commands that the engine carries out or answers.
var builders = map[string]buildFunc{
	"xadd": buildXAdd, "xlen": buildXLen, "xrange": buildRange(false), "xrevrange": buildRange(true), "xdel": buildXDel, "xtrim": buildXTrim,
	"xsetid": buildXSetID, "xread": buildXRead, "xreadgroup": buildXReadGroup, "xack": buildXAck, "xclaim": buildXClaim, "xautoclaim": buildXAutoClaim,
	"xpending": buildXPending, "xgroup|create": buildXGroupCreate, "xgroup|setid": buildXGroupSetID, "xgroup|destroy": buildXGroup(engine.GroupDestroy),
	"xgroup|createconsumer": buildXGroup(engine.GroupAddConsumer), "xgroup|delconsumer": buildXGroup(engine.GroupDelConsumer),
	"xinfo|stream": buildXInfoStream, "xinfo|groups": buildXInfoGroups, "xinfo|consumers": buildXInfoConsumers,
	"tercet|getgroup": buildGetGroup, "tercet|setgroup": buildSetGroup, "tercet|getstream": buildGetStream, "tercet|setstream": buildSetStream,
	"tercet|parked": buildParked, "tercet|redrive": buildParkedOp(engine.Redrive), "tercet|drop": buildParkedOp(engine.Drop), "tercet|cancel": buildCancel,

	"xdelex": buildXDelEx, "xackdel": buildXAckDel, "xnack": buildXNack,

	"del": buildDel, "unlink": buildDel, "exists": buildExists, "touch": buildExists, "type": buildType,
	"ttl": buildTTL(false, true), "pttl": buildTTL(false, false), "expiretime": buildTTL(true, true), "pexpiretime": buildTTL(true, false),
	"expire": buildExpire("expire", false, true), "pexpire": buildExpire("pexpire", false, false),
	"expireat": buildExpire("expireat", true, true), "pexpireat": buildExpire("pexpireat", true, false), "persist": buildPersist,
	"rename": buildRename(false), "renamenx": buildRename(true), "copy": buildCopy, "scan": buildScan, "keys": buildKeys, "dbsize": buildDBSize, "randomkey": buildRandomKey,
	"object|encoding": buildObject("encoding"), "object|freq": buildObject("freq"), "object|idletime": buildObject("idletime"), "object|refcount": buildObject("refcount"),
	"memory|usage": buildMemoryUsage,
	"set":          buildSet, "get": buildGet, "getdel": buildGetDel, "flushall": buildFlush, "flushdb": buildFlush,
}

// init binds the handlers to the catalogue and makes sure that nothing is left over.
func init() {
	handlers = make([]handler, command.Count())
	for name, f := range locals {
		handlers[idOf(name)].local = f
	}
	for name, f := range builders {
		handlers[idOf(name)].build = f
	}
	for _, s := range command.Specs() {
		for _, k := range append([]*command.Spec{s}, s.Subcommands...) {
			if h := handlers[k.ID]; h.local == nil && h.build == nil && len(k.Subcommands) == 0 {
				panic("compat: nothing answers " + k.Name)
			}
		}
	}
}

func idOf(name string) command.ID {
	s := command.Lookup(name)
	if s == nil {
		panic(fmt.Sprintf("compat: %s is not in the catalogue", name))
	}
	return s.ID
}
