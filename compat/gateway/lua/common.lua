-- Shared by all scripts of a topic. Keys, in this order:
--   1 stream, 2 delayed, 3 staged, 4 placed, 5 leases, 6 next, 7 held, 8 aside, 9 parked, 10 why
-- All of them hash to the stream's slot. What each holds is drawn in DESIGN.md.
local stream, delayed, staged, placed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local leases, nexts, held, aside, parked, why = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- number turns a score or a count into decimal digits; Lua's own form would be 1.7e+12.
local function number(n) return string.format('%.0f', n) end

-- field returns the value of a field in a flat list of pairs.
local function field(pairs, name)
  for i = 1, #pairs, 2 do
    if pairs[i] == name then return pairs[i + 1] end
  end
  return nil
end

-- mature places delayed messages whose time has come, a bounded number at a time.
local function mature(most)
  local due = redis.call('ZRANGE', delayed, '-inf', now, 'BYSCORE', 'LIMIT', 0, most)
  for _, n in ipairs(due) do
    local packed = redis.call('HGET', staged, n)
    if packed then
      local pairs = cmsgpack.unpack(packed)
      local expires = field(pairs, 'tercet-expires')
      if not expires or tonumber(expires) > now then
        local id = redis.call('XADD', stream, '*', unpack(pairs))
        redis.call('HSET', placed, n, id)
      end
      redis.call('HDEL', staged, n)
    end
    redis.call('ZREM', delayed, n)
  end
end

-- A held message: "count granted expires ahead base deployment". base is the count at its last return from the dead letters. ahead is 1 for a message that was given out by its id
-- before the group's position reached it, 2 once that one is settled.
local function load(id)
  local v = redis.call('HGET', held, id)
  if not v then return nil end
  local count, granted, expires, ahead, base, deployment = string.match(v, '^(%d+) (%d+) (%d+) (%d) (%d+) (.*)$')
  return { count = tonumber(count), granted = tonumber(granted), expires = tonumber(expires), ahead = tonumber(ahead), base = tonumber(base), deployment = deployment }
end

local function save(id, h)
  redis.call('HSET', held, id, number(h.count) .. ' ' .. number(h.granted) .. ' ' .. number(h.expires) .. ' ' .. h.ahead .. ' ' .. number(h.base or 0) .. ' ' .. h.deployment)
end

-- backoff is the earliest time of the next delivery: from the 33rd delivery on it is forced apart.
local function backoff(h)
  if h.count < 33 then return 0 end
  return h.granted + math.min(2 ^ (h.count - 32), 900) * 1000
end

-- grant leases a message and returns what is told to the consumer.
local function grant(id, pairs, h, visibility)
  h.count = h.count + 1
  h.granted = now
  save(id, h)
  redis.call('ZADD', leases, now + visibility, id)
  redis.call('ZADD', nexts, math.max(now + visibility, backoff(h)), id)
  return { id, number(h.count), number(now + visibility), pairs }
end

-- forget ends the group's interest in a message.
local function forget(group, id)
  redis.call('XACK', stream, group, id)
  redis.call('ZREM', leases, id)
  redis.call('ZREM', nexts, id)
  redis.call('HDEL', held, id)
end

-- parts of an id, for comparing.
local function before(a, b)
  local ams, aseq = string.match(a, '^(%d+)-(%d+)$')
  local bms, bseq = string.match(b, '^(%d+)-(%d+)$')
  if #ams ~= #bms then return #ams < #bms end
  if ams ~= bms then return ams < bms end
  if #aseq ~= #bseq then return #aseq < #bseq end
  return aseq < bseq
end

-- position returns the id of the last message the group has passed, nil without the group.
local function position(group)
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  if groups.err then return nil end
  for _, g in ipairs(groups) do
    if field(g, 'name') == group then return field(g, 'last-delivered-id') end
  end
  return nil
end

-- create makes the group, and the stream if need be.
local function create(group, start)
  local made = redis.pcall('XGROUP', 'CREATE', stream, group, start, 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then return made end
  return nil
end

-- padded makes ids sort as text.
local function padded(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return string.rep('0', 20 - #ms) .. ms .. '-' .. string.rep('0', 20 - #seq) .. seq
end

local function unpadded(id)
  local ms, seq = string.match(id, '^0*(%d+)-0*(%d+)$')
  return ms .. '-' .. seq
end
