package gateway

import (
	_ "embed"

	"github.com/valkey-io/valkey-go"
)

// The scripts, each behind what they share. Every one runs on the keys of one topic, which live in one slot.
var (
	//go:embed lua/common.lua
	luaCommon string
	//go:embed lua/publish.lua
	luaPublish string
	//go:embed lua/receive.lua
	luaReceive string
	//go:embed lua/receiveid.lua
	luaReceiveID string
	//go:embed lua/settle.lua
	luaSettle string
	//go:embed lua/peek.lua
	luaPeek string
	//go:embed lua/sweep.lua
	luaSweep string
	//go:embed lua/parked.lua
	luaParked string

	// The looks are read-only, so that replicas run them.
	scriptLook   = valkey.NewLuaScriptReadOnly(luaCommon + luaPeek)
	scriptLookID = valkey.NewLuaScriptReadOnly(luaCommon + luaReceiveID)

	scriptPublish   = valkey.NewLuaScript(luaCommon + luaPublish)
	scriptReceive   = valkey.NewLuaScript(luaCommon + luaReceive)
	scriptReceiveID = valkey.NewLuaScript(luaCommon + luaReceiveID)
	scriptSettle    = valkey.NewLuaScript(luaCommon + luaSettle)
	scriptSweep     = valkey.NewLuaScript(luaCommon + luaSweep)
	scriptParked    = valkey.NewLuaScript(luaCommon + luaParked)
)

// keysOf returns the keys of a topic, and of a group of it, in the order that the scripts expect. A stream's own
// name is its hash tag: "{orders}:…" and "orders" are in one slot.
func keysOf(topic, group string) []string {
	base := "{" + topic + "}:tercet:"
	g := base + "group:" + group + ":"
	return []string{
		topic, base + "delayed", base + "staged", base + "placed",
		g + "leases", g + "next", g + "held", g + "aside", g + "parked", g + "why",
	}
}

// idempotencyKey is the key that remembers an idempotency key of a topic's partition.
func idempotencyKey(topic, deployment, key string) string {
	return "{" + topic + "}:tercet:key:" + deployment + ":" + key
}
